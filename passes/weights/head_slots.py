"""Attention matrices of a layer with fewer or narrower heads, in the places that attention gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rk_export.passes.base import Layer, role_paths
from rk_export.passes.modules.heads import HeadSlots, PaddedHeads, SlicedHeads
from rk_export.plan import SitePlan

ATTENTION = ("q", "k", "v", "o")


def attention_paths(sites: Sequence[SitePlan]) -> dict[str, str]:
    """Return the paths of q, k, v and o by role."""
    paths = role_paths(sites)
    return {role: paths[role] for role in ATTENTION}


def head_slots(layer: Layer, paths: Mapping[str, str]) -> dict[str, HeadSlots]:
    """Return the heads of q, k, v and o as they are now; those of o are what it reads."""
    head_dim = layer.linear(paths["k"]).out_features // layer.kv_groups
    slots = {}
    for role, path in paths.items():
        module = layer.module.get_submodule(path)
        if isinstance(module, PaddedHeads | SlicedHeads):
            slots[role] = module.slots
        else:
            linear = layer.linear(path)
            heads = (linear.in_features if role == "o" else linear.out_features) // head_dim
            slots[role] = HeadSlots(heads, head_dim, heads, head_dim)
    return slots


def with_groups(slots: Mapping[str, HeadSlots], kept: int) -> dict[str, HeadSlots]:
    """Return the slots after all but `kept` key/value heads went, each with its query heads."""
    groups = slots["k"].heads
    return {role: replace(slot, heads=slot.heads // groups * kept) for role, slot in slots.items()}


def with_values(slots: Mapping[str, HeadSlots], width: int) -> dict[str, HeadSlots]:
    """Return the slots of v and o with value heads of another width."""
    return {role: replace(slots[role], width=width) for role in ("v", "o")}


def place_heads(
    layer: Layer, paths: Mapping[str, str], linears: Mapping[str, nn.Module], slots: Mapping[str, HeadSlots]
) -> None:
    """Put reduced matrices in, within the padding or slicing that their heads need."""
    for role, linear in linears.items():
        kind = SlicedHeads if role == "o" else PaddedHeads
        layer.module.set_submodule(paths[role], kind(linear, slots[role]))


def group_entries(size: int, groups: int, kept: Sequence[int]) -> Tensor:
    """Return the indices of the kept groups among `size` rows or columns in equal blocks, one a group."""
    return torch.arange(size).view(groups, -1)[list(kept)].flatten()

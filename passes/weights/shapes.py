"""All dimensions that a plan takes from a layer: with weights, or on empty modules for what is loaded later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from rk_export.passes.base import Layer, ShapePass, role_paths
from rk_export.passes.modules.heads import HeadSlots
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.weights.head_slots import (
    attention_paths,
    head_slots,
    place_heads,
    with_groups,
    with_values,
)
from rk_export.passes.weights.prune_groups import PruneGroups
from rk_export.passes.weights.prune_width import PruneWidth, mlp_paths
from rk_export.passes.weights.reduced import empty_linear, shape_finding, weight_bytes
from rk_export.passes.weights.truncate_values import TruncateValues
from rk_export.plan import LayerShape, SitePlan
from rk_export.report.records import Finding


def reshape_layer(
    layer: Layer,
    shape: LayerShape | None,
    sites: Sequence[SitePlan],
    curvatures: Mapping[str, Curvature],
    device: torch.device,
) -> tuple[Layer, list[Finding]]:
    """Shrink a layer in place; return it with the KV groups that it has now, and the findings.

    Args:
        layer: The layer, dense.
        shape: What it loses; None for nothing.
        sites: Its sites.
        curvatures: Of the dense layer, by site name.
        device: Where the choices and corrections are computed.
    """
    if shape is None:
        return layer, []
    passes: tuple[ShapePass, ...] = (PruneWidth(device), PruneGroups(device), TruncateValues(device))
    findings = [
        shape_pass.rewrite(layer, shape, sites, curvatures)
        for shape_pass in passes
        if shape_pass.applies(shape)
    ]
    return _with_kept_groups(layer, shape), findings


def empty_shape(layer: Layer, shape: LayerShape | None, sites: Sequence[SitePlan]) -> Layer:
    """Give a layer of meta modules the shape that `reshape_layer` leaves, and return it alike."""
    if shape is None:
        return layer
    if shape.ffn_width is not None:
        _empty_width(layer, mlp_paths(sites), shape.ffn_width)
    if shape.kv_groups is not None or shape.value_dim is not None:
        _empty_heads(layer, attention_paths(sites), shape)
    return _with_kept_groups(layer, shape)


def planned_shape(
    layer: Layer, shape: LayerShape | None, sites: Sequence[SitePlan]
) -> tuple[Layer, list[Finding]]:
    """Do as `empty_shape`, and return the findings of `reshape_layer` as far as shapes alone tell them."""
    findings = []
    for name in ("ffn_width", "kv_groups", "value_dim"):
        if shape is None or (value := getattr(shape, name)) is None:
            continue
        linears = [layer.linear(path) for path in role_paths(sites).values()]
        layer = empty_shape(layer, LayerShape(layer.index, **{name: value}), sites)
        left = [layer.linear(path) for path in role_paths(sites).values()]
        kept = len(value) if name == "kv_groups" else value
        findings.append(
            shape_finding(layer, name, weight_bytes(linears) - weight_bytes(left), None, kept=kept)
        )
    return layer, findings


def _with_kept_groups(layer: Layer, shape: LayerShape) -> Layer:
    return layer if shape.kv_groups is None else replace(layer, kv_groups=len(shape.kv_groups))


def _empty_width(layer: Layer, paths: Mapping[str, str], width: int) -> None:
    for role, path in paths.items():
        linear = layer.linear(path)
        columns, rows = linear.in_features, linear.out_features
        columns, rows = (width, rows) if role == "down" else (columns, width)
        layer.replace(path, empty_linear(columns, rows, bias=linear.bias is not None))


def _empty_heads(layer: Layer, paths: Mapping[str, str], shape: LayerShape) -> None:
    slots = head_slots(layer, paths)
    changed: dict[str, HeadSlots] = {}
    if shape.kv_groups is not None:
        slots = changed = with_groups(slots, len(shape.kv_groups))
    if shape.value_dim is not None:
        changed = changed | with_values(slots, shape.value_dim)
    linears = {}
    for role, slot in changed.items():
        linear, size = layer.linear(paths[role]), slot.heads * slot.width
        has_bias = linear.bias is not None
        if role == "o":
            # The output projection takes what narrow values lose of their bias.
            has_bias |= shape.value_dim is not None and layer.linear(paths["v"]).bias is not None
            linears[role] = empty_linear(size, linear.out_features, bias=has_bias)
        else:
            linears[role] = empty_linear(linear.in_features, size, bias=has_bias)
    place_heads(layer, paths, linears, changed)

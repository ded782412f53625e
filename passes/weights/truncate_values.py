"""Narrower value heads (see `passes/numerics/value_heads.py`): fewer rows of v, fewer columns of o, no new product.

A bias b of the values adds W_O b to every output, as attention weights sum to one. What the narrow values lose
of it goes into a bias of the output projection, so it stays exact whatever their width. The second moment of
attention's output has b in it and no mean to take it out; with a bias the moment of v's input serves instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from rk_export.passes.base import Layer, inputs_of_role
from rk_export.passes.modules.heads import HeadSlots
from rk_export.passes.modules.quantized import linear_of
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.value_heads import NarrowValues, narrow_values, value_moments
from rk_export.passes.weights.head_slots import (
    attention_paths,
    group_entries,
    head_slots,
    place_heads,
    with_values,
)
from rk_export.passes.weights.reduced import shape_finding, weight_bytes
from rk_export.plan import LayerShape, SitePlan
from rk_export.report.records import Finding


class TruncateValues:
    """Give the value heads of a layer the planned width.

    Args:
        device: Where the truncation is computed.
    """

    name = "value_dim"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def applies(self, shape: LayerShape) -> bool:
        return shape.value_dim is not None

    @torch.no_grad()
    def rewrite(
        self,
        layer: Layer,
        shape: LayerShape,
        sites: Sequence[SitePlan],
        curvatures: Mapping[str, Curvature],
    ) -> Finding:
        paths, width = attention_paths(sites), shape.value_dim or 0
        slots = head_slots(layer, paths)
        v, o = layer.linear(paths["v"]), layer.linear(paths["o"])
        weighed_by, H = self._moments(layer, shape, sites, curvatures)
        groups, dim = slots["v"].heads, slots["v"].width
        narrow = narrow_values(o.weight.to(self.device), H, groups, dim, width)
        smaller = _narrow_linears(v, o, narrow, slots)
        place_heads(layer, paths, smaller, with_values(slots, width))
        removed = weight_bytes([v, o]) - weight_bytes(smaller.values())
        details = {"kept": width, "of": dim, "weighed_by": weighed_by}
        return shape_finding(layer, self.name, removed, narrow.error, **details)

    def _moments(
        self,
        layer: Layer,
        shape: LayerShape,
        sites: Sequence[SitePlan],
        curvatures: Mapping[str, Curvature],
    ) -> tuple[str, Tensor]:
        """Return the second moment of what o reads, the pruned groups left out, and where it comes from."""
        paths = attention_paths(sites)
        slots = head_slots(layer, paths)
        v = layer.linear(paths["v"])
        attended, hidden = inputs_of_role("o", sites, curvatures), inputs_of_role("v", sites, curvatures)
        if attended is not None and v.bias is None:
            H = attended.second.to(self.device)
            kept = shape.kv_groups or range(layer.kv_groups)
            entries = group_entries(len(H), layer.kv_groups, kept).to(self.device)
            return "attention output", H[entries][:, entries]
        second = torch.eye(v.in_features) if hidden is None else hidden.second
        H = value_moments(
            v.weight.to(self.device), second.to(self.device), slots["v"].heads, slots["o"].heads
        )
        return ("weights" if hidden is None else "input"), H


def _narrow_linears(
    v: nn.Linear, o: nn.Linear, narrow: NarrowValues, slots: Mapping[str, HeadSlots]
) -> dict[str, nn.Linear]:
    """Return the new v and o; o has a bias where either had one."""
    home, dtype = v.weight.device, v.weight.dtype
    weight = narrow.narrowed(v.weight.to(narrow.down.device)).to(home, dtype)
    output = narrow.output.to(home)
    if v.bias is None:
        return {"v": linear_of(weight), "o": linear_of(output, o.bias)}
    repeat = slots["o"].heads // slots["v"].heads

    def by_head(bias: Tensor) -> Tensor:
        return bias.view(slots["v"].heads, -1).repeat_interleave(repeat, 0).flatten()

    bias = narrow.narrowed(v.bias[:, None].to(narrow.down.device))[:, 0].to(home, dtype)
    lost = o.weight @ by_head(v.bias) - output @ by_head(bias)
    return {"v": linear_of(weight, bias), "o": linear_of(output, lost if o.bias is None else o.bias + lost)}

"""Whole KV groups that go: a key/value head with its query heads, and the correction of the output projection.

The cache of the exported graph keeps its number of heads: zeros stand where a head is missing, so weights and
their products shrink, the cache does not. Heads are alike to attention, so those that stay move to the front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rk_export.passes.base import Layer, inputs_of_role
from rk_export.passes.modules.quantized import linear_of
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.pruning import Reduction, block_costs, refit
from rk_export.passes.weights.head_slots import (
    attention_paths,
    group_entries,
    head_slots,
    place_heads,
    with_groups,
)
from rk_export.passes.weights.reduced import rows_of, shape_finding, weight_bytes
from rk_export.plan import LayerShape, SitePlan
from rk_export.report.records import Finding


class PruneGroups:
    """Keep the KV groups that the plan names.

    Args:
        device: Where the correction is computed.
    """

    name = "kv_groups"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def applies(self, shape: LayerShape) -> bool:
        return shape.kv_groups is not None

    @torch.no_grad()
    def rewrite(
        self,
        layer: Layer,
        shape: LayerShape,
        sites: Sequence[SitePlan],
        curvatures: Mapping[str, Curvature],
    ) -> Finding:
        paths, kept = attention_paths(sites), shape.kv_groups or ()
        linears = {role: layer.linear(path) for role, path in paths.items()}
        o, moments = linears["o"], inputs_of_role("o", sites, curvatures)
        W = o.weight.to(self.device)
        H = torch.eye(o.in_features) if moments is None else moments.second
        stay = group_entries(o.in_features, layer.kv_groups, kept).to(self.device)
        inputs = Reduction.of_columns(H.to(self.device), stay)
        corrected = W[:, stay] if moments is None else refit(W, W[:, stay], inputs)
        smaller = {
            role: rows_of(linear, group_entries(linear.out_features, layer.kv_groups, kept))
            for role, linear in linears.items()
            if role != "o"
        }
        smaller["o"] = linear_of(corrected.to(o.weight.device), o.bias)
        place_heads(layer, paths, smaller, with_groups(head_slots(layer, paths), len(kept)))
        removed = weight_bytes(linears.values()) - weight_bytes(smaller.values())
        details = {"kept": len(kept), "of": layer.kv_groups, "corrected": moments is not None}
        return shape_finding(layer, self.name, removed, inputs.error(W, corrected), **details)


def group_scores(layer: Layer, sites: Sequence[SitePlan], curvatures: Mapping[str, Curvature]) -> Tensor:
    """Return what dropping each KV group costs, (groups,), comparable within the layer.

    With the second moment of the output projection's input: the squared error of its output after the
    correction. Without: the squared norm of the group's maps from input to output, values through heads.
    """
    paths = attention_paths(sites)
    o, v = layer.linear(paths["o"]), layer.linear(paths["v"])
    moments = inputs_of_role("o", sites, curvatures)
    if moments is not None:
        return block_costs(o.weight, moments.second.to(o.weight.device), layer.kv_groups)
    groups, dim = layer.kv_groups, v.out_features // layer.kv_groups
    values = v.weight.double().view(groups, dim, -1)
    outputs = o.weight.T.double().reshape(groups, -1, dim, o.out_features)  # (groups, heads of one, dim, out)
    maps = outputs @ outputs.mT  # W_Oᵀ W_O of each head
    return torch.einsum("ghij,gik,gjk->g", maps, values, values)

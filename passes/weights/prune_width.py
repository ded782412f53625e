"""FFN neurons that go, and the least-squares correction of the down-projection for those that stay.

With the second moment of the down-projection's input, neurons are eliminated backwards and the rest refitted
(see `passes/numerics/pruning.py`). Without it the norms of a neuron's weights decide and nothing is refitted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from rk_export.passes.base import Layer, inputs_of_role, role_paths
from rk_export.passes.modules.quantized import linear_of
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.pruning import Reduction, eliminate_columns, largest, neuron_norms, refit
from rk_export.passes.weights.reduced import rows_of, shape_finding, weight_bytes
from rk_export.plan import LayerShape, SitePlan
from rk_export.report.records import Finding

# Neurons overlap little and their moments are noisy. At 0.9 of the width the MLP outputs of four layers of
# SmolLM2-135M were off by 0.148 on text that the moments had not seen, with a damping of 0.01 of the mean diagonal
# entry instead by 0.156; neurons ranked by E[h²] ‖w‖² and refitted alike gave 0.152.
DAMPING = 0.3


class PruneWidth:
    """Keep `ffn_width` neurons of a layer's MLP, gated or not.

    Args:
        device: Where the choice and the correction are computed.
    """

    name = "ffn_width"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def applies(self, shape: LayerShape) -> bool:
        return shape.ffn_width is not None

    @torch.no_grad()
    def rewrite(
        self,
        layer: Layer,
        shape: LayerShape,
        sites: Sequence[SitePlan],
        curvatures: Mapping[str, Curvature],
    ) -> Finding:
        paths, width = mlp_paths(sites), shape.ffn_width or 0
        linears = {role: layer.linear(path) for role, path in paths.items()}
        down, moments = linears["down"], inputs_of_role("down", sites, curvatures)
        W = down.weight.to(self.device)
        if moments is None:
            H = torch.eye(down.in_features, device=self.device)
            rows = [linear.weight.to(self.device) for role, linear in linears.items() if role != "down"]
            kept = largest(neuron_norms(rows, W), width)
        else:
            H = moments.second.to(self.device)
            kept = eliminate_columns(W, H, width, DAMPING)
        inputs = Reduction.of_columns(H, kept)
        corrected = W[:, kept] if moments is None else refit(W, W[:, kept], inputs, DAMPING)
        smaller = {role: rows_of(linear, kept) for role, linear in linears.items() if role != "down"}
        smaller["down"] = linear_of(corrected.to(down.weight.device), down.bias)
        for role, linear in smaller.items():
            layer.replace(paths[role], linear)
        removed = weight_bytes(linears.values()) - weight_bytes(smaller.values())
        details = {"kept": width, "of": down.in_features, "corrected": moments is not None}
        return shape_finding(layer, self.name, removed, inputs.error(W, corrected), **details)


def mlp_paths(sites: Sequence[SitePlan]) -> dict[str, str]:
    """Return the paths of an MLP's matrices by role: gate where there is one, up, down."""
    paths = role_paths(sites)
    return {role: paths[role] for role in ("gate", "up", "down") if role in paths}

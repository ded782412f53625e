"""FFN neurons scaled: rows of up over s, columns of down times s (SmoothQuant, 2211.10438, inside the MLP).

In a gated MLP the activation acts on the gate alone, so up may be scaled freely. Without a gate the activation
itself must be positively homogeneous: ReLU is, GELU is not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rk_export.passes.prepare.parameters import read, set_parameter, weight
from rk_export.passes.prepare.wiring import Wiring

# Peaks further than this from their geometric mean count as this far: half precision must hold the weights.
LARGEST_RATIO = 1e3


def neuron_scales(peaks: Tensor, alpha: float) -> Tensor:
    """Return s = (peak / geometric mean of the peaks) ** alpha, one a neuron, float64.

    Args:
        peaks: Largest absolute input of down by neuron, (n,), at least 0; 0 (never active) gives s = 1.
        alpha: 0 scales nothing, 1 makes all peaks equal.
    """
    positive = peaks.double() > 0
    logs = peaks.double().where(positive, torch.ones(())).log()
    mean = logs.sum() / positive.sum().clamp(min=1)
    bound = torch.tensor(LARGEST_RATIO, dtype=torch.float64).log().item()
    distance = (logs - mean).clamp(-bound, bound)
    return (alpha * distance).where(positive, torch.zeros(())).exp()


@torch.no_grad()
def scale_neurons(up: nn.Module, down: nn.Module, scales: Tensor) -> None:
    """Divide the rows of up by `scales` (n,) and multiply the columns of down, in place."""
    matrix, bias = weight(up), read(up, "bias")
    scales = scales.to(matrix)
    set_parameter(up, "weight", matrix / scales[:, None])
    if bias is not None:
        set_parameter(up, "bias", bias / scales)
    set_parameter(down, "weight", weight(down) * scales)


def scale_layer(layer: nn.Module, wiring: Wiring, peaks: Mapping[str, Tensor], alpha: float) -> None:
    """Scale the neurons of a layer's MLP, or of each expert, in place; `peaks` by path of down."""
    for up, down in wiring.mlps:
        scales = neuron_scales(peaks[down], alpha)
        scale_neurons(layer.get_submodule(up), layer.get_submodule(down), scales)

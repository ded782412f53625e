"""What is known about every matrix of a dense model, and what an error in one of them costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rk_export.matrix_id import MatrixId
from rk_export.passes.base import Layer

_KINDS = ("second", "peaks", "gradients")
_TOKEN_PEAKS = "token_peaks"


@dataclass(frozen=True)
class DenseStatistics:
    """What one pass over the dense model tells about every matrix; experts that no token reached are absent.

    Args:
        second: Mean over tokens of x xᵀ, x what the matrix reads, float32 (in, in); matrices that read the same
            input share one tensor.
        peaks: Largest magnitude of each feature that the matrix reads, float32 (in,); shared likewise.
        token_peaks: Mean over tokens of the square of a token's largest magnitude, which sets the step of int8 inputs.
        gradients: Sum over tokens of g gᵀ, g the gradient of the mean loss by the matrix' output, float32
            (out, out), or its diagonal (out,): an error ΔW of the matrix costs ½ tokens tr(G ΔW C ΔWᵀ) nats a token
            (1503.05671), G this and C `second`. Empty where nothing ran back.
        tokens: Predicted tokens that the loss is the mean of.
    """

    second: Mapping[MatrixId, Tensor]
    peaks: Mapping[MatrixId, Tensor]
    token_peaks: Mapping[MatrixId, float]
    gradients: Mapping[MatrixId, Tensor]
    tokens: int

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors, each once, named by kind, layer and the paths that share it."""
        packed = {"tokens": torch.tensor(self.tokens)}
        for (layer, path), peak in self.token_peaks.items():
            packed[f"{_TOKEN_PEAKS}|{layer}|{path}"] = torch.tensor(peak, dtype=torch.float64)
        for kind in _KINDS:
            tensors: Mapping[MatrixId, Tensor] = getattr(self, kind)
            shared: defaultdict[int, list[MatrixId]] = defaultdict(list)
            for place, tensor in tensors.items():
                shared[id(tensor)].append(place)
            for places in shared.values():
                name = "|".join([kind, str(places[0][0]), *(path for _, path in places)])
                packed[name] = tensors[places[0]]
        return packed

    @classmethod
    def from_tensors(cls, packed: Mapping[str, Tensor]) -> DenseStatistics:
        """Return the statistics that `to_tensors` packed."""
        kinds: dict[str, dict[MatrixId, Tensor]] = {kind: {} for kind in (*_KINDS, _TOKEN_PEAKS)}
        for name, tensor in packed.items():
            if name != "tokens":
                kind, layer, *paths = name.split("|")
                kinds[kind] |= {MatrixId(int(layer), path): tensor for path in paths}
        token_peaks = {place: float(peak) for place, peak in kinds.pop(_TOKEN_PEAKS).items()}
        return cls(**kinds, token_peaks=token_peaks, tokens=int(packed["tokens"]))


def layerwise(statistics: DenseStatistics, layers: Iterable[Layer]) -> DenseStatistics:
    """Return statistics whose gradients weigh every matrix by its relative error alone.

    Then the predicted loss of an error is half its relative squared error, |E C^½|² / |W C^½|²: what can be said
    about a matrix without running the model backward.

    Args:
        statistics: Second moments of the inputs; the gradients are replaced.
        layers: Of the dense model, with their weights.
    """
    gradients = {}
    for layer in layers:
        for place in (place for place in statistics.second if place.layer == layer.index):
            W = layer.linear(place.path).weight
            C = statistics.second[place].to(W.device)
            power = float(((W @ C) * W).sum(dtype=torch.float64))
            gradients[place] = torch.full((W.shape[0],), 1 / max(power, 1e-30) / statistics.tokens)
    return replace(statistics, gradients=gradients)

"""What is known about every matrix of a dense model, and what an error in one of them costs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_KINDS = ("second", "peaks", "gradients")
_TOKEN_PEAKS = "token_peaks"

Place = tuple[int, str]  # layer index, path of a matrix in the canonical layer


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

    second: Mapping[Place, Tensor]
    peaks: Mapping[Place, Tensor]
    token_peaks: Mapping[Place, float]
    gradients: Mapping[Place, Tensor]
    tokens: int

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors, each once, named by kind, layer and the paths that share it."""
        packed = {"tokens": torch.tensor(self.tokens)}
        for (layer, path), peak in self.token_peaks.items():
            packed[f"{_TOKEN_PEAKS}|{layer}|{path}"] = torch.tensor(peak, dtype=torch.float64)
        for kind in _KINDS:
            tensors: Mapping[Place, Tensor] = getattr(self, kind)
            shared: defaultdict[int, list[Place]] = defaultdict(list)
            for place, tensor in tensors.items():
                shared[id(tensor)].append(place)
            for places in shared.values():
                name = "|".join([kind, str(places[0][0]), *(path for _, path in places)])
                packed[name] = tensors[places[0]]
        return packed

    @classmethod
    def from_tensors(cls, packed: Mapping[str, Tensor]) -> DenseStatistics:
        """Return the statistics that `to_tensors` packed."""
        kinds: dict[str, dict[Place, Tensor]] = {kind: {} for kind in (*_KINDS, _TOKEN_PEAKS)}
        for name, tensor in packed.items():
            if name != "tokens":
                kind, layer, *paths = name.split("|")
                kinds[kind] |= {(int(layer), path): tensor for path in paths}
        token_peaks = {place: float(peak) for place, peak in kinds.pop(_TOKEN_PEAKS).items()}
        return cls(**kinds, token_peaks=token_peaks, tokens=int(packed["tokens"]))


def layerwise(statistics: DenseStatistics, weights: Mapping[Place, Tensor]) -> DenseStatistics:
    """Return statistics whose gradients weigh every matrix by its relative error alone.

    Then the predicted loss of an error is half its relative squared error, |E C^½|² / |W C^½|²: what can be said
    about a matrix without running the model backward.

    Args:
        statistics: Second moments of the inputs; the gradients are replaced.
        weights: The dense matrices (out, in).
    """
    gradients = {}
    for place, W in weights.items():
        if place in statistics.second:
            C = statistics.second[place].to(W.device)
            power = float(((W @ C) * W).sum(dtype=torch.float64))
            gradients[place] = torch.full((W.shape[0],), 1 / max(power, 1e-30) / statistics.tokens)
    return replace(statistics, gradients=gradients)

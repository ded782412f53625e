"""What is known about every matrix of a dense model: the store that curvatures are taken from."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from rk_export.device import CPU
from rk_export.matrix_id import MatrixId
from rk_export.passes.base import Layer
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.threads import total
from rk_export.plan import SitePlan

# Tokens that an expert must have read for each of its inputs. GPTQ to INT4 by the moment of fewer fits what only they
# say: a gate of SmolLM2 with 576 inputs has an error of 0.069 by 512 tokens, 0.057 by 1024, and 0.061 by its weights.
READS_PER_INPUT = 1.75

_KINDS = ("second", "peaks", "gradients")
_TOKEN_PEAKS, _READS = "token_peaks", "reads"
_TOKENS, _EMBEDDING = "tokens", "embedding"


@dataclass(frozen=True)
class DenseStatistics:
    """What one pass over the dense model tells about every matrix; experts that no token reached are absent.

    Args:
        second: Mean over tokens of x xᵀ, x what the matrix reads, float32 (in, in); matrices that read the same
            input share one tensor.
        peaks: Largest magnitude of each feature that the matrix reads, float32 (in,); shared likewise.
        token_peaks: Mean over tokens of the square of a token's largest magnitude, which sets the step of int8 inputs.
        gradients: Sum over tokens of g gᵀ, g the gradient of the mean loss by the matrix' output, float32
            (out, out), or its diagonal (out,); times `tokens` it is the G of `Curvature`. Empty where nothing ran back.
        tokens: Predicted tokens that the loss is the mean of.
        embedding: Mean over tokens of the squared gradient of a token's loss by what the embedding writes (dim,); None
            where nothing ran back.
        reads: How many tokens each matrix read: an expert only those that are routed to it.
    """

    second: Mapping[MatrixId, Tensor]
    peaks: Mapping[MatrixId, Tensor]
    token_peaks: Mapping[MatrixId, float]
    gradients: Mapping[MatrixId, Tensor]
    tokens: int
    embedding: Tensor | None = None
    reads: Mapping[MatrixId, int] = field(default_factory=dict)

    def at(self, place: MatrixId) -> Curvature:
        """Return the curvature of one matrix.

        Raises:
            KeyError: If no token reached the matrix.
        """
        (curvature,) = self.of_groups([{"matrix": place}])
        if curvature is None:
            raise KeyError(place)
        return curvature

    def of_sites(self, sites: Iterable[SitePlan], device: torch.device = CPU) -> Iterator[Curvature | None]:
        """Yield the curvature of each site of a layer; None for experts and where no token came."""
        groups = (
            {} if "expert" in site.members else dict(zip(site.members, site.matrices, strict=True))
            for site in sites
        )
        return self.of_groups(groups, device)

    def of_groups(
        self, groups: Iterable[Mapping[str, MatrixId]], device: torch.device = CPU
    ) -> Iterator[Curvature | None]:
        """Yield the curvature of each group of matrices that read the same; None for groups that are not known.

        Groups that read the same share the object of their inputs, and with it what is derived from them. Ask for one
        layer at a time: that is kept as long as the curvatures.

        Args:
            groups: The matrices of each by role, in stacking order.
            device: Where the curvatures are used.
        """
        known = self.gradients or self.second
        shared: dict[int, Inputs] = {}
        for group in groups:
            places = list(group.values())
            if not places or any(place not in known for place in places):
                yield None
                continue
            key = id(self.second[places[0]])
            if key not in shared:
                shared[key] = self._inputs(places[0], device)
            outputs = {
                role: self.gradients[place].to(device) for role, place in group.items() if self.gradients
            }
            yield Curvature(shared[key], outputs, self.tokens)

    def of_experts(self, sites: Iterable[SitePlan]) -> dict[MatrixId, Curvature]:
        """Return what is known of each expert's matrix that read enough tokens, without gradients."""
        shared: dict[int, Curvature] = {}
        found = {}
        for place in (place for site in sites if "expert" in site.members for place in site.matrices):
            tokens = self.reads.get(place, 0)
            if not tokens or tokens < READS_PER_INPUT * len(self.second[place]):
                continue
            second = self.second[place]
            own = Inputs(second, token_peak=self.token_peaks.get(place, 0.0), tokens=tokens)
            found[place] = shared.setdefault(id(second), Curvature(own))
        return found

    def _inputs(self, place: MatrixId, device: torch.device) -> Inputs:
        peak = self.token_peaks.get(place, 0.0)
        return Inputs(self.second[place].to(device), token_peak=peak, tokens=self.tokens)

    def of_matrices(self) -> dict[str, Tensor]:
        """Return what is known of the matrices, each tensor once, named by kind, layer and the paths that share it."""
        packed: dict[str, Tensor] = {}
        for (layer, path), peak in self.token_peaks.items():
            packed[f"{_TOKEN_PEAKS}|{layer}|{path}"] = torch.tensor(peak, dtype=torch.float64)
        for (layer, path), count in self.reads.items():
            packed[f"{_READS}|{layer}|{path}"] = torch.tensor(count)
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
        """Return the statistics of a model from what `of_matrices` packed, the tokens and the embedding beside it."""
        kinds: dict[str, dict[MatrixId, Tensor]] = {kind: {} for kind in (*_KINDS, _TOKEN_PEAKS, _READS)}
        for name, tensor in packed.items():
            if name not in (_TOKENS, _EMBEDDING):
                kind, layer, *paths = name.split("|")
                kinds[kind] |= {MatrixId(int(layer), path): tensor for path in paths}
        token_peaks = {place: float(peak) for place, peak in kinds.pop(_TOKEN_PEAKS).items()}
        reads = {place: int(count) for place, count in kinds.pop(_READS).items()}
        return cls(
            **kinds,
            token_peaks=token_peaks,
            tokens=int(packed[_TOKENS]),
            embedding=packed.get(_EMBEDDING),
            reads=reads,
        )


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
            power = float(total((W @ C) * W))
            gradients[place] = torch.full((W.shape[0],), 1 / max(power, 1e-30) / statistics.tokens)
    return replace(statistics, gradients=gradients, embedding=None)

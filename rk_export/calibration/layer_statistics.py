"""Where the statistics of a layer's sites come from while the model is rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedModel

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.calibration.gain import gain_statistics
from rk_export.calibration.streamed_moments import CalibrationStreams
from rk_export.model.architecture import Architecture
from rk_export.model.description import ModelDescription
from rk_export.passes.base import Layer
from rk_export.passes.numerics.curvature import Curvature
from rk_export.plan import SitePlan

BySite = dict[str, Curvature]


class LayerStatistics(Protocol):
    """Curvatures by site name, asked for layer by layer; sites that nothing is known about are absent.

    Experts share a site and read different tokens: theirs are by the name of the matrix.
    """

    def begin(self, model: PreTrainedModel) -> None:
        """Look at the model while its embedding is still dense."""

    def embedded(self) -> None:
        """Take note that the embedding is what it will be."""

    def of_sites(self, layer: Layer, sites: Sequence[SitePlan]) -> BySite:
        """Return the curvatures of a layer that is still dense."""
        ...

    def pass_by(self, layer: Layer, sites: Sequence[SitePlan]) -> None:
        """Take note of a dense layer whose curvatures nobody asks for."""

    def rewritten(self, index: int) -> None:
        """Take note that a layer is what it will be."""


class Stationary:
    """Statistics that do not depend on what became of the layers before."""

    def begin(self, model: PreTrainedModel) -> None:
        """Nothing to look at."""

    def embedded(self) -> None:
        """Nothing to note."""

    def pass_by(self, layer: Layer, sites: Sequence[SitePlan]) -> None:
        """Nothing to note."""

    def rewritten(self, index: int) -> None:
        """Nothing to note."""


class NoStatistics(Stationary):
    """All inputs and outputs weigh alike."""

    def of_sites(self, layer: Layer, sites: Sequence[SitePlan]) -> BySite:
        return {}


@dataclass(frozen=True)
class FromGains(Stationary):
    """Moments estimated from the norms' gains and the weights (see `gain.py`)."""

    description: ModelDescription

    def of_sites(self, layer: Layer, sites: Sequence[SitePlan]) -> BySite:
        return gain_statistics(layer, sites, self.description)


@dataclass(frozen=True)
class FromDense(Stationary):
    """Moments of inputs and of output gradients in the dense model."""

    known: DenseStatistics

    def of_sites(self, layer: Layer, sites: Sequence[SitePlan]) -> BySite:
        found = zip(sites, self.known.of_sites(sites), strict=True)
        of_sites = {site.site: curvature for site, curvature in found if curvature is not None}
        return of_sites | {place.name: own for place, own in self.known.of_experts(sites).items()}


@dataclass
class FromPrefix:
    """Moments of inputs taken through the part that is rewritten already; gradients from the dense model.

    Args:
        dense: The dense model's statistics.
        tokens: Calibration text, int64 (sequences, length).
        architecture: The model's family.
    """

    dense: FromDense
    tokens: Tensor
    architecture: Architecture
    _streams: CalibrationStreams | None = field(default=None, init=False)

    def begin(self, model: PreTrainedModel) -> None:
        self._streams = CalibrationStreams(model, self.architecture, self.tokens)

    def embedded(self) -> None:
        self._present().start()

    def of_sites(self, layer: Layer, sites: Sequence[SitePlan]) -> BySite:
        gradients = self.dense.of_sites(layer, sites)
        return {
            name: replace(gradients[name], inputs=seen.inputs) if name in gradients else seen
            for name, seen in self._present().observe(layer.index, layer, sites).items()
        }

    def pass_by(self, layer: Layer, sites: Sequence[SitePlan]) -> None:
        self._present().observe(layer.index, layer, sites)

    def rewritten(self, index: int) -> None:
        self._present().advance(index)

    def _present(self) -> CalibrationStreams:
        if self._streams is None:
            raise RuntimeError("`begin` comes first")
        return self._streams

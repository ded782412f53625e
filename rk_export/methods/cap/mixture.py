"""Our own choice of rank and sparsity: one allocation over mixtures that are fitted anew, not over CAP's candidates.

CAP (2505.03801) splits a matrix once and then leaves parts of the split out, which no longer fit what remains.
Here every matrix offers mixtures, a number of entries with a rank, each priced, and with the loss that the
curvature predicts for the best low-rank part beside those entries; one budget is spent over all of them, and the
mixtures that were chosen are fitted.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.matrix_id import MatrixId
from rk_export.methods.sparse_sites import Prices, check_source, on_disk
from rk_export.passes.numerics.allocation import SiteChoices, allocate
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.numerics.mixed import fitted_mixture, mixture_losses, refitted
from rk_export.progress import track
from rk_export.scratch import kept
from rk_export.source.protocol import Source
from rk_export.tensor_cache import as_tensors, from_tensors

logger = logging.getLogger(__name__)

# Shares of the entries that are set aside; all of them is the dense matrix.
DENSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
RANKS = 64  # ranks on offer beside each
_VERSION = 1
_OFFERED = ("ranks", "entries", "losses")
_PARTS = ("up", "down", "indices", "values")


@dataclass(frozen=True)
class Mixtures:
    """What one matrix may become.

    Args:
        shape: (out, in).
        ranks: (mixtures,), integers.
        entries: (mixtures,), integers.
        losses: Predicted, nats per token (mixtures,), float64.
    """

    shape: tuple[int, int]
    ranks: Tensor
    entries: Tensor
    losses: Tensor

    def choices(self, prices: Prices) -> SiteChoices:
        """Return the mixtures with their prices."""
        pairs = zip(self.ranks.tolist(), self.entries.tolist(), strict=True)
        costs = [prices.total(self.shape, rank, entries) for rank, entries in pairs]
        return SiteChoices(np.array(costs), self.losses.numpy().astype(np.float64))


def offered_mixtures(
    source: Source,
    statistics: DenseStatistics,
    device: torch.device,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[MatrixId, Mixtures]:
    """Return what every matrix of the decoder layers may become; layers that were seen before are read from disk.

    Args:
        source: The dense model.
        statistics: Of the dense model.
        device: Where matrices are decomposed.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.

    Raises:
        InputError: If the model is an encoder or has experts.
    """
    check_source(source, "cap")
    offered: dict[MatrixId, Mixtures] = {}
    for layer in track(
        _matrices(source, statistics, device), "offering mixtures, layers", source.layer_count
    ):
        known = layer.cached("mixtures", _OFFERED, _offer, cache_dir, densities=DENSITIES, ranks=RANKS)
        for name, W in layer.weights.items():
            offered[MatrixId(layer.index, name)] = Mixtures(
                (W.shape[0], W.shape[1]), *from_tensors(known, name, _OFFERED)
            )
    return offered


def _offer(name: str, W: Tensor, curvature: Curvature) -> Mixtures:
    return mixtures_of(W, curvature)


def mixtures_of(W: Tensor, curvature: Curvature) -> Mixtures:
    """Return what W (out, in) may become: a grid of entries and ranks below the dense price, and the dense matrix."""
    rows, columns = W.shape
    size, direction = rows * columns, rows + columns
    counts = [round(density * size) for density in DENSITIES]
    losses = mixture_losses(W, curvature, counts).cpu()
    ranks, entries, found = [0], [size], [0.0]
    for count, by_rank in zip(counts, losses, strict=True):
        top = min(rows, columns, (size - count) // direction)
        for rank in sorted({round(top * step / RANKS) for step in range(RANKS + 1)}):
            ranks.append(rank)
            entries.append(count)
            found.append(float(by_rank[rank]))
    return Mixtures(
        (rows, columns),
        torch.tensor(ranks),
        torch.tensor(entries),
        torch.tensor(found, dtype=torch.float64),
    )


def cheapest(offered: Mapping[MatrixId, Mixtures], prices: Prices) -> float:
    """Return what the cheapest mixture costs that keeps anything."""
    costs = (mixtures.choices(prices).costs for mixtures in offered.values())
    return min(float(cost[cost > 0].min()) for cost in costs)


def mixture_selection(
    source: Source,
    offered: Mapping[MatrixId, Mixtures],
    budget: float,
    prices: Prices,
    statistics: DenseStatistics,
    device: torch.device,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[MatrixId, Parts]:
    """Spend a budget over the mixtures of all matrices, and fit the chosen ones, layer by layer.

    Args:
        source: The dense model.
        offered: From `offered_mixtures`.
        budget: What the matrices may cost, in the unit of `prices`.
        prices: Of numbers and entries.
        statistics: Of the dense model.
        device: Where matrices are decomposed; the parts come to the CPU.
        cache_dir: The cache, where fitted layers are kept; ``~/.cache/rk-export`` when None.
    """
    allocated = allocate([mixtures.choices(prices) for mixtures in offered.values()], budget)
    logger.info("mixtures: predicted loss %.4f", allocated.loss)
    chosen = {
        place: (int(mixtures.ranks[index]), int(mixtures.entries[index]))
        for (place, mixtures), index in zip(offered.items(), allocated.taken, strict=True)
    }
    parts: dict[MatrixId, Parts] = {}
    for layer in track(_matrices(source, statistics, device), "fitting mixtures, layers", source.layer_count):
        here = {name: chosen[MatrixId(layer.index, name)] for name in layer.weights}
        known = layer.cached("fitted", _PARTS, partial(_fitted, here), cache_dir, chosen=here)
        for name in here:
            parts[MatrixId(layer.index, name)] = Parts(*from_tensors(known, name, _PARTS))
    return parts


def _fitted(chosen: Mapping[str, tuple[int, int]], name: str, W: Tensor, curvature: Curvature) -> Parts:
    return fitted_mixture(W, curvature, *chosen[name])


def refitted_parts(
    source: Source, parts: Mapping[MatrixId, Parts], statistics: DenseStatistics, device: torch.device
) -> dict[MatrixId, Parts]:
    """Return parts of the same ranks and entries with low-rank parts that are best beside the entries.

    What CAP's split put into directions and entries that were left out is lost to both; this makes up for much of
    it, at no price.

    Args:
        source: The dense model.
        parts: What was chosen, of every matrix.
        statistics: Of the dense model.
        device: Where matrices are decomposed; the parts come to the CPU.
    """
    return {
        (place := MatrixId(layer.index, name)): on_disk(refitted(W, curvature, parts[place]))
        for layer in _matrices(source, statistics, device)
        for name, W, curvature in layer.curvatures()
    }


@dataclass(frozen=True)
class _Matrices:
    """The matrices of one layer, by path, and their curvature."""

    index: int
    weights: Mapping[str, Tensor]
    statistics: DenseStatistics
    device: torch.device

    def curvatures(self) -> Iterator[tuple[str, Tensor, Curvature]]:
        """Yield every matrix with its curvature."""
        groups = [{name: MatrixId(self.index, name)} for name in self.weights]
        known = self.statistics.of_groups(groups, self.device)
        for (name, W), curvature in zip(self.weights.items(), known, strict=True):
            if curvature is None:
                raise KeyError(f"no token reached {name} of layer {self.index}")
            yield name, W.to(self.device), curvature

    def cached(
        self,
        kind: str,
        fields: Sequence[str],
        make: Callable[[str, Tensor, Curvature], object],
        cache_dir: str | os.PathLike[str] | None,
        **more: object,
    ) -> Mapping[str, Tensor]:
        """Return what is made of every matrix, or was made of it in an earlier run, packed by its fields."""

        def made() -> Mapping[str, Tensor]:
            return as_tensors({name: make(name, W, known) for name, W, known in self.curvatures()}, fields)

        return kept(f"cap-{kind}", self.key(**more), made, cache_dir)

    def key(self, **more: object) -> dict[str, object]:
        """Return what is computed from these matrices depends on, with more of it."""
        digest = hashlib.sha256(str(self.statistics.tokens).encode())
        for name, W in self.weights.items():
            place = MatrixId(self.index, name)
            digest.update(f"{name} {tuple(W.shape)}".encode())
            for tensor in (W, self.statistics.second[place], self.statistics.gradients[place]):
                digest.update(tensor.contiguous().numpy().data)
        return {"matrices": digest.hexdigest(), "device": self.device.type, "version": _VERSION, **more}


def _matrices(source: Source, statistics: DenseStatistics, device: torch.device) -> Iterator[_Matrices]:
    for layer in source.layers():
        projections = source.description.projections(layer.index)
        weights = {item.path: layer.linear(item.path).weight.detach().float() for item in projections}
        yield _Matrices(layer.index, weights, statistics, device)

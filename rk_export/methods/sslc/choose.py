"""From a budget to sparse and low-rank parts of every matrix (SSLC, 2510.26446), by one allocation over predicted loss.

Every matrix may have some ranks, each beside many numbers of entries, with its cost and the loss that the curvature
predicts for what goes. The budget is allocated over all of them, and what was chosen is fitted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.matrix_id import MatrixId
from rk_export.methods.sparse_sites import (
    Prices,
    amount_of,
    check_source,
    log_choice,
    on_disk,
    share_of_entries,
)
from rk_export.methods.sslc.options import SslcOptions
from rk_export.options.ranks import Budget
from rk_export.passes.numerics.allocation import SiteChoices, allocate
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.numerics.pruning import damped
from rk_export.passes.numerics.sslc import Target, dropped_losses, falling_counts
from rk_export.progress import track
from rk_export.source.protocol import Source

logger = logging.getLogger(__name__)

# Shares of a matrix' parameters that its low-rank part may take.
RANK_SHARES = (0.0, 0.03)
COUNTS = 49  # numbers of entries to choose from beside each rank
# Share of itself by which every diagonal entry of a second moment is raised: least squares over thousands of tokens
# would else fit what only these tokens say.
DAMPING = 0.3
# How strongly output curvature tells the rows of a matrix apart when its entries are chosen.
ROW_POWER = 0.5


def sslc_parts(
    source: Source,
    budget: Budget,
    options: SslcOptions,
    *,
    statistics: DenseStatistics,
    device: torch.device,
    prices: Prices | None = None,
) -> dict[MatrixId, Parts]:
    """Choose rank and sparse entries of every matrix of the decoder layers, and fit them to each other.

    Args:
        source: The dense model.
        budget: `keep` is the share of the matrices' parameters that may remain, a direction of an (out, in) matrix
            counted as out + in and an entry as one; `size` is the bytes that they may take.
        options: How entries go.
        statistics: Of the dense model.
        device: Where matrices are fitted.
        prices: Bytes of what is stored, for `size`; `BYTES` when None.

    Returns:
        The parts by layer index and path in the canonical layer; on the CPU, mapped, float32.

    Raises:
        InputError: If the model is an encoder or has experts, or the budget keeps nothing, or holds everything.
    """
    check_source(source, options.name)
    amount, prices = amount_of(source, budget, prices)
    share = share_of_entries(source, amount, prices)

    def tracked(what: str) -> Iterable[tuple[MatrixId, Target]]:
        return track(targets(source, statistics, device), what, len(source.description.matrices))

    candidates = {
        place: candidates_of(target, share, statistics.gradients[place].to(device) * statistics.tokens)
        for place, target in tracked("pricing matrices")
    }
    allocated = allocate([item.choices(prices) for item in candidates.values()], amount)
    logger.info("sslc: predicted loss %.4f", allocated.loss)
    chosen = {
        place: item.at(index)
        for (place, item), index in zip(candidates.items(), allocated.taken, strict=True)
    }
    parts = {}
    for place, target in tracked("fitting matrices"):
        rank, entries = chosen[place]
        counts = falling_counts(target.W.numel(), entries, options.stages)
        parts[place] = on_disk(target.fitted(counts, rank).parts())
    log_choice(parts)
    return parts


def targets(
    source: Source, statistics: DenseStatistics, device: torch.device
) -> Iterator[tuple[MatrixId, Target]]:
    """Yield every matrix of the decoder layers with what its errors cost, layer by layer."""
    for layer in source.layers():
        moments: dict[int, Tensor] = {}
        for item in source.description.projections(layer.index):
            place = MatrixId(layer.index, item.path)
            second = statistics.second[place]
            if id(second) not in moments:
                moments[id(second)] = damped(second.to(device), DAMPING).float()
            rows = _diagonal(statistics.gradients[place].to(device)).pow(ROW_POWER)
            W = layer.linear(item.path).weight.detach().to(device, torch.float32)
            yield place, Target(W, moments[id(second)], rows)


@dataclass(frozen=True)
class Candidates:
    """What one matrix may become.

    Args:
        shape: (out, in).
        ranks: (candidates,), integers.
        entries: (candidates,), integers.
        losses: Predicted, nats per token (candidates,), float64.
    """

    shape: tuple[int, int]
    ranks: np.ndarray[tuple[int], np.dtype[np.int64]]
    entries: np.ndarray[tuple[int], np.dtype[np.int64]]
    losses: np.ndarray[tuple[int], np.dtype[np.float64]]

    def choices(self, prices: Prices) -> SiteChoices:
        """Return the candidates with their costs."""
        pairs = zip(self.ranks.tolist(), self.entries.tolist(), strict=True)
        return SiteChoices(np.array([prices.total(self.shape, *pair) for pair in pairs]), self.losses)

    def at(self, index: int) -> tuple[int, int]:
        """Return rank and entries of one of them."""
        return int(self.ranks[index]), int(self.entries[index])


def candidates_of(target: Target, share: float, gradient: Tensor) -> Candidates:
    """Return what a matrix may become where the budget holds a share of all entries.

    Predictions hold for small errors, so none strays far: between half that share and halfway to all.

    Args:
        target: The matrix.
        share: Between 0 and 1.
        gradient: G summed over tokens, (out, out) or its diagonal (out,).
    """
    size, shape = target.W.numel(), (target.W.shape[0], target.W.shape[1])
    costs = _diagonal(gradient)[:, None] * target.columns
    found: list[tuple[int, int, float]] = []
    for rank in sorted({round(part * size / sum(shape)) for part in RANK_SHARES}):
        kept = np.linspace(share / 2, (1 + share) / 2, COUNTS) * size - rank * sum(shape)
        counts = [int(number) for number in kept if number >= 0]
        losses = 0.5 * dropped_losses(target.start(rank, int(share * size)).sparse, costs, counts)
        found += [(rank, *point) for point in zip(counts, losses.tolist(), strict=True)]
    ranks, entries, predicted = (np.array(column) for column in zip(*found, strict=True))
    return Candidates(shape, ranks, entries, predicted)


def _diagonal(gradient: Tensor) -> Tensor:
    return (gradient if gradient.ndim == 1 else gradient.diagonal()).clamp_min(0)

"""Our own choice of rank and sparsity: one auction over mixtures that are fitted anew, not over CAP's candidates.

CAP (2505.03801) splits a matrix once and then leaves parts of the split out, which no longer fit what remains.
Here every matrix offers mixtures, a number of entries with a rank, each priced, and with the loss that the
curvature predicts for the best low-rank part beside those entries; one budget is spent over all of them, and the
mixtures that were bought are fitted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rk_export.cap_pools import Prices, check_source
from rk_export.dense_statistics import DenseStatistics, Place
from rk_export.load import ModelSource
from rk_export.passes.numerics.auction import Lot, auction
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.mixed import TwoSides, fitted_mixture, mixture_losses, refitted
from rk_export.sites import loaded_layers

logger = logging.getLogger(__name__)

# Shares of the entries that are set aside; all of them is the dense matrix.
DENSITIES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
RANKS = 64  # ranks on offer beside each


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

    def lot(self, prices: Prices) -> Lot:
        """Return the mixtures with their prices."""
        pairs = zip(self.ranks.tolist(), self.entries.tolist(), strict=True)
        costs = [prices.total(self.shape, rank, entries) for rank, entries in pairs]
        return Lot(np.array(costs), self.losses.numpy().astype(np.float64))


def offered_mixtures(
    source: ModelSource, statistics: DenseStatistics, device: torch.device
) -> dict[Place, Mixtures]:
    """Return what every matrix of the decoder layers may become.

    Raises:
        InputError: If the model is an encoder or has experts.
    """
    check_source(source)
    offered = {}
    for place, W, sides in _matrices(source, statistics, device):
        offered[place] = mixtures_of(W, sides)
        logger.info("mixtures of layer %d of %d, %s", place[0] + 1, source.layer_count, place[1])
    return offered


def mixtures_of(W: Tensor, sides: TwoSides) -> Mixtures:
    """Return what W (out, in) may become: a grid of entries and ranks below the dense price, and the dense matrix."""
    rows, columns = W.shape
    size, direction = rows * columns, rows + columns
    counts = [round(density * size) for density in DENSITIES]
    losses = mixture_losses(W, sides, counts).cpu()
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


def cheapest(offered: Mapping[Place, Mixtures], prices: Prices) -> float:
    """Return what the cheapest mixture costs that keeps anything."""
    costs = (mixtures.lot(prices).costs for mixtures in offered.values())
    return min(float(cost[cost > 0].min()) for cost in costs)


def mixture_selection(
    source: ModelSource,
    offered: Mapping[Place, Mixtures],
    budget: float,
    prices: Prices,
    statistics: DenseStatistics,
    device: torch.device,
) -> dict[Place, Parts]:
    """Spend a budget over the mixtures of all matrices, and fit those that were bought.

    Args:
        source: The dense model.
        offered: From `offered_mixtures`.
        budget: What the matrices may cost, in the unit of `prices`.
        prices: Of numbers and entries.
        statistics: Of the dense model.
        device: Where matrices are decomposed; the parts come to the CPU.
    """
    choice = auction([mixtures.lot(prices) for mixtures in offered.values()], budget)
    logger.info("mixtures: predicted loss %.4f", choice.loss)
    bought = {
        place: (int(mixtures.ranks[index]), int(mixtures.entries[index]))
        for (place, mixtures), index in zip(offered.items(), choice.taken, strict=True)
    }
    parts = {}
    for place, W, sides in _matrices(source, statistics, device):
        parts[place] = fitted_mixture(W, sides, *bought[place])
        logger.info("fitted: layer %d of %d, %s", place[0] + 1, source.layer_count, place[1])
    return parts


def refitted_parts(
    source: ModelSource, parts: Mapping[Place, Parts], statistics: DenseStatistics, device: torch.device
) -> dict[Place, Parts]:
    """Return parts of the same ranks and entries with low-rank parts that are best beside the entries.

    What CAP's split put into directions and entries that were left out is lost to both; this makes up for much of
    it, at no price.

    Args:
        source: The dense model.
        parts: What was chosen, of every matrix.
        statistics: Of the dense model.
        device: Where matrices are decomposed; the parts come to the CPU.
    """
    matrices = _matrices(source, statistics, device)
    return {place: refitted(W, sides, parts[place]) for place, W, sides in matrices}


def _matrices(
    source: ModelSource, statistics: DenseStatistics, device: torch.device
) -> Iterator[tuple[Place, Tensor, TwoSides]]:
    """Yield every matrix with its curvature; matrices that read the same input share its metric."""
    for layer in loaded_layers(source):
        metrics: dict[int, Metric] = {}
        for item in source.architecture.projections(source.config, layer.index):
            place = layer.index, item.path
            second = statistics.second[place]
            if id(second) not in metrics:
                metrics[id(second)] = Metric.of(second.to(device))
            outputs = Metric.of(statistics.gradients[place].to(device) * statistics.tokens)
            W = layer.linear(item.path).weight.detach().to(device, torch.float32)
            yield place, W, TwoSides(metrics[id(second)], outputs)

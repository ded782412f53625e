"""What a candidate of CAP's pools (2505.03801) is worth for its price, by its energy or by the loss' curvature.

The candidates of largest score within a budget are a choice that needs no search.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.pools import Pool, Pools, candidates, flat_prices, selected, taken_within
from rk_export.methods.sparse_sites import Prices
from rk_export.passes.numerics.knapsack import largest_within
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.passes.numerics.mixed import part_losses
from rk_export.passes.numerics.threads import total
from rk_export.scratch import joined

# Scores of one matrix' candidates (candidates,), float32; a larger one is kept sooner, one of -inf never.
Score = Callable[[MatrixId, Pool], Tensor]
_LEAST = 1e-30


def all_scores(score: Score, pools: Pools) -> Tensor:
    """Return the scores of all candidates of a model (candidates,), float32, on disk."""
    return joined((score(place, pool) for place, pool in pools.items()), candidates(pools))


def energy_score(prices: Prices) -> Score:
    """Return the score without data: squared norm per price, over the mean square of the matrix."""

    def score(place: MatrixId, pool: Pool) -> Tensor:
        dense = pool.parts.dense()
        scale = (total(dense.square()) / dense.numel()).to(dense).clamp_min(_LEAST)
        return pool.energies() / pool.prices(prices) / scale

    return score


def curvature_score(prices: Prices, statistics: DenseStatistics) -> Score:
    """Return the score by what the loss would rise without a candidate, per price (1503.05671).

    Gains of single candidates do not add up where inputs are correlated. Weighing every candidate beside the error
    of the present choice, and choosing anew, diverges: thousands that share a direction change sides together.
    """

    def score(place: MatrixId, pool: Pool) -> Tensor:
        return part_losses(pool.parts, statistics.at(place)) / pool.prices(prices)

    return score


def directions_only(score: Score) -> Score:
    """Return a score under which entries are never taken."""

    def of_directions(place: MatrixId, pool: Pool) -> Tensor:
        found = score(place, pool).clone()
        found[pool.parts.rank :] = -torch.inf
        return found

    return of_directions


def largest_scores(score: Score, pools: Pools, budget: float, prices: Prices) -> dict[MatrixId, Parts]:
    """Choose the largest scores of all matrices together.

    Args:
        score: Per price, see above.
        pools: The candidates, on the CPU.
        budget: What those kept may cost.
        prices: Of the candidates.
    """
    return selected(pools, taken_within(all_scores(score, pools), flat_prices(pools, prices), budget))


def largest_of_each(score: Score, pools: Pools, budget: float, prices: Prices) -> dict[MatrixId, Parts]:
    """Choose the largest scores of every matrix, each with its share of the budget by its dense size."""
    share = budget / sum(pool.parts.shape[0] * pool.parts.shape[1] for pool in pools.values())
    chosen = {}
    for place, pool in pools.items():
        rows, columns = pool.parts.shape
        taken = largest_within(score(place, pool), pool.prices(prices), share * rows * columns)
        chosen[place] = pool.selected(taken)
    return chosen

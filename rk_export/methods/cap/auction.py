"""A deterministic choice from CAP's pools (2505.03801): the largest score per price first, over all matrices."""

from __future__ import annotations

from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.pools import Pools, flat_prices, selected
from rk_export.methods.cap.scores import Score, all_scores
from rk_export.methods.sparse_sites import Prices
from rk_export.passes.numerics.knapsack import largest_within
from rk_export.passes.numerics.low_rank_plus_sparse import Parts


def auction_selection(score: Score, pools: Pools, budget: float, prices: Prices) -> dict[MatrixId, Parts]:
    """Choose the largest scores of all matrices together.

    Args:
        score: Per price, see `cap_scores`.
        pools: The candidates, on the CPU.
        budget: What those kept may cost.
        prices: Of the candidates.
    """
    taken = largest_within(all_scores(score, pools), flat_prices(pools, prices), budget)
    return selected(pools, taken)


def selection_of_each(score: Score, pools: Pools, budget: float, prices: Prices) -> dict[MatrixId, Parts]:
    """Choose the largest scores of every matrix, each with its share of the budget by its dense size."""
    share = budget / sum(pool.parts.shape[0] * pool.parts.shape[1] for pool in pools.values())
    chosen = {}
    for place, pool in pools.items():
        rows, columns = pool.parts.shape
        taken = largest_within(score(place, pool), pool.prices(prices), share * rows * columns)
        chosen[place] = pool.selected(taken)
    return chosen

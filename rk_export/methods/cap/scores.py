"""What a candidate of CAP's pools (2505.03801) is worth for its price: by its energy, or by the loss' curvature."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.pools import Pool, Pools
from rk_export.methods.sparse_sites import Prices
from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.low_rank_plus_sparse import Parts

# Scores of one matrix' candidates (candidates,), float32; a larger one is kept sooner, one of -inf never.
Score = Callable[[MatrixId, Pool], Tensor]
_LEAST = 1e-30


def all_scores(score: Score, pools: Pools) -> Tensor:
    """Return the scores of all candidates of a model (candidates,)."""
    return torch.cat([score(place, pool) for place, pool in pools.items()])


def energy_score(prices: Prices) -> Score:
    """Return the score without data: squared norm per price, over the mean square of the matrix."""

    def score(place: MatrixId, pool: Pool) -> Tensor:
        scale = pool.parts.dense().square().mean().clamp_min(_LEAST)
        return pool.energies() / pool.prices(prices) / scale

    return score


def curvature_score(prices: Prices, statistics: DenseStatistics) -> Score:
    """Return the score by what the loss would rise without a candidate, per price (1503.05671).

    Gains of single candidates do not add up where inputs are correlated. Weighing every candidate beside the error
    of the present choice, and choosing anew, diverges: thousands that share a direction change sides together.
    """

    def score(place: MatrixId, pool: Pool) -> Tensor:
        sides = Sides.of(statistics, place)
        return 0.5 * sides.tokens * sides.squares(pool.parts) / pool.prices(prices)

    return score


def directions_only(score: Score) -> Score:
    """Return a score under which entries are never taken."""

    def of_directions(place: MatrixId, pool: Pool) -> Tensor:
        found = score(place, pool).clone()
        found[pool.parts.rank :] = -torch.inf
        return found

    return of_directions


@dataclass(frozen=True)
class Sides:
    """The curvature of one matrix.

    Args:
        second: C (in, in).
        gradient: G (out, out), or its diagonal (out,).
        tokens: As in `DenseStatistics`.
    """

    second: Tensor
    gradient: Tensor
    tokens: int

    @classmethod
    def of(cls, statistics: DenseStatistics, place: MatrixId) -> Sides:
        """Return the curvature of a matrix."""
        return cls(statistics.second[place], statistics.gradients[place], statistics.tokens)

    def squares(self, parts: Parts) -> Tensor:
        """Return tr(G X C Xᵀ) of every candidate X (candidates,): each direction's, then each entry's."""
        up, down = parts.up, parts.down
        G, C = self.gradient, self.second
        weighed = G[:, None] * up if G.ndim == 1 else product(G, up)
        directions = (weighed * up).sum(0) * (product(down, C) * down).sum(1)
        rows = (G if G.ndim == 1 else G.diagonal())[parts.indices.long() // parts.shape[1]]
        columns = C.diagonal()[parts.indices.long() % parts.shape[1]]
        return torch.cat([directions, parts.values.square() * rows * columns])

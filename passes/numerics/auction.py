"""One budget spent over many sites: from each site's candidates one is chosen, so that the total loss is least.

At a price λ for a unit of cost every site takes the candidate of least loss + λ cost, independently of the
others; the price at which the costs add up to the budget is found by bisection (Everett's generalized Lagrange
multipliers, 1963). Candidates off the lower convex hull of (cost, loss) are never taken this way, so what is
left of the budget is spent greedily on the best single exchanges.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_BISECTIONS = 100
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Lot:
    """The candidates of one site.

    Args:
        costs: (candidates,), in the budget's unit.
        losses: (candidates,), predicted nats per token.
    """

    costs: Floats
    losses: Floats


@dataclass(frozen=True)
class Choice:
    """Outcome of an auction.

    Args:
        taken: Index of the candidate taken at each site.
        runner_up: Index of the candidate that would have been next at the final price; the taken one where a
            site has no other.
        price: λ, predicted loss per unit of cost.
        cost: What the taken candidates cost together.
        loss: Their predicted loss.
    """

    taken: tuple[int, ...]
    runner_up: tuple[int, ...]
    price: float
    cost: float
    loss: float


def least_cost(lots: Sequence[Lot]) -> float:
    """Return the smallest total cost that the candidates allow."""
    return float(sum(lot.costs.min() for lot in lots))


def auction(lots: Sequence[Lot], budget: float) -> Choice:
    """Choose a candidate at every site.

    Raises:
        ValueError: If even the cheapest candidates cost more than the budget.
    """
    if least_cost(lots) > budget * (1 + 1e-9):
        raise ValueError(f"the cheapest candidates cost {least_cost(lots):g}, the budget is {budget:g}")
    price = _price(lots, budget)
    taken = _spend_rest(lots, _at_price(lots, price), budget)
    return Choice(
        taken=tuple(taken),
        runner_up=tuple(_runner_up(lot, index, price) for lot, index in zip(lots, taken, strict=True)),
        price=price,
        cost=_total(lots, taken),
        loss=float(sum(lot.losses[index] for lot, index in zip(lots, taken, strict=True))),
    )


def _at_price(lots: Sequence[Lot], price: float) -> list[int]:
    # Of equals the cheaper one: without a price all that lose nothing are equal.
    return [int(np.lexsort((lot.costs, lot.losses + price * lot.costs))[0]) for lot in lots]


def _total(lots: Sequence[Lot], taken: Sequence[int]) -> float:
    return float(sum(lot.costs[index] for lot, index in zip(lots, taken, strict=True)))


def _price(lots: Sequence[Lot], budget: float) -> float:
    """Return the lowest price at which the budget holds."""
    if _total(lots, _at_price(lots, 0.0)) <= budget:
        return 0.0
    scale = sum(float(np.ptp(lot.losses)) for lot in lots) / max(budget, 1e-30)
    low, high = scale * 1e-12, scale
    while _total(lots, _at_price(lots, high)) > budget:
        high *= 10
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if _total(lots, _at_price(lots, middle)) > budget:
            low = middle
        else:
            high = middle
    return high


def _spend_rest(lots: Sequence[Lot], taken: list[int], budget: float) -> list[int]:
    """Exchange candidates for better ones, the most loss saved per cost first, while the budget lasts."""
    room = budget - _total(lots, taken)
    queue: list[tuple[float, int, int]] = []
    for site, lot in enumerate(lots):
        _offer(queue, lot, site, taken[site], room)
    while queue:
        _, site, index = heapq.heappop(queue)
        lot, present = lots[site], taken[site]
        extra = float(lot.costs[index] - lot.costs[present])
        if lot.losses[index] < lot.losses[present] and extra <= room:
            taken[site] = index
            room -= extra
        if extra > room or taken[site] == index:
            _offer(queue, lot, site, taken[site], room)
    return taken


def _offer(queue: list[tuple[float, int, int]], lot: Lot, site: int, present: int, room: float) -> None:
    """Put the best affordable exchange of a site into the queue."""
    saved, extra = lot.losses[present] - lot.losses, lot.costs - lot.costs[present]
    useful = np.flatnonzero((saved > 0) & (extra <= room))
    if len(useful):
        worth = saved[useful] / np.maximum(extra[useful], 1e-30)
        best = int(useful[worth.argmax()])
        heapq.heappush(queue, (-float(worth.max()), site, best))


def _runner_up(lot: Lot, taken: int, price: float) -> int:
    score = lot.losses + price * lot.costs
    others = np.delete(np.arange(len(score)), taken)
    return int(others[score[others].argmin()]) if len(others) else taken

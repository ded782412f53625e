"""One budget spent over many sites: from each site's candidates one is chosen, so that the total loss is least.

At a multiplier λ for a unit of cost every site takes the candidate of least loss + λ cost, independently of the
others; the multiplier at which the costs add up to the budget is found by bisection (Everett's generalized Lagrange
multipliers, 1963). Candidates off the lower convex hull of (cost, loss) are never taken this way, so what is
left of the budget is spent greedily on the best single exchanges.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

_BISECTIONS = 100
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SiteChoices:
    """The candidates of one site.

    Args:
        costs: (candidates,), in the budget's unit.
        losses: (candidates,), predicted nats per token.
    """

    costs: Floats
    losses: Floats


@dataclass(frozen=True)
class Allocated:
    """Outcome of an allocation.

    Args:
        taken: Index of the candidate taken at each site.
        runner_up: Index of the candidate that would have been next at the final multiplier; the taken one where a
            site has no other.
        multiplier: λ, predicted loss per unit of cost.
        cost: What the taken candidates cost together.
        loss: Their predicted loss.
    """

    taken: tuple[int, ...]
    runner_up: tuple[int, ...]
    multiplier: float
    cost: float
    loss: float


def least_cost(sites: Sequence[SiteChoices]) -> float:
    """Return the smallest total cost that the candidates allow."""
    return float(sum(choices.costs.min() for choices in sites))


def allocate(sites: Sequence[SiteChoices], budget: float, start: Sequence[int] | None = None) -> Allocated:
    """Choose a candidate at every site.

    Args:
        sites: What each may become.
        budget: What all may cost together.
        start: Candidates to improve on, if they keep the budget: with few sites Lagrange multipliers may miss what is
            as good. The result loses no more than they do.

    Raises:
        ValueError: If even the cheapest candidates cost more than the budget.
    """
    if least_cost(sites) > budget * (1 + 1e-9):
        raise ValueError(f"the cheapest candidates cost {least_cost(sites):g}, the budget is {budget:g}")
    multiplier = _multiplier(sites, budget)
    taken = _spend_rest(sites, _at(sites, multiplier), budget)
    if start is not None and _total(sites, start) <= budget:
        taken = min(taken, _spend_rest(sites, list(start), budget), key=partial(_loss, sites))
    return Allocated(
        taken=tuple(taken),
        runner_up=tuple(
            _runner_up(choices, index, multiplier) for choices, index in zip(sites, taken, strict=True)
        ),
        multiplier=multiplier,
        cost=_total(sites, taken),
        loss=_loss(sites, taken),
    )


def _at(sites: Sequence[SiteChoices], multiplier: float) -> list[int]:
    # Of equals the cheaper one: without a multiplier all that lose nothing are equal.
    return [
        int(np.lexsort((choices.costs, choices.losses + multiplier * choices.costs))[0]) for choices in sites
    ]


def _total(sites: Sequence[SiteChoices], taken: Sequence[int]) -> float:
    return float(sum(choices.costs[index] for choices, index in zip(sites, taken, strict=True)))


def _loss(sites: Sequence[SiteChoices], taken: Sequence[int]) -> float:
    return float(sum(choices.losses[index] for choices, index in zip(sites, taken, strict=True)))


def _multiplier(sites: Sequence[SiteChoices], budget: float) -> float:
    """Return the lowest multiplier at which the budget holds."""
    if _total(sites, _at(sites, 0.0)) <= budget:
        return 0.0
    scale = sum(float(np.ptp(choices.losses)) for choices in sites) / max(budget, 1e-30)
    low, high = scale * 1e-12, scale
    while _total(sites, _at(sites, high)) > budget:
        high *= 10
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        if _total(sites, _at(sites, middle)) > budget:
            low = middle
        else:
            high = middle
    return high


def _spend_rest(sites: Sequence[SiteChoices], taken: list[int], budget: float) -> list[int]:
    """Exchange candidates for better ones, the most loss saved per cost first, while the budget lasts."""
    room = budget - _total(sites, taken)
    queue: list[tuple[float, int, int]] = []
    for site, choices in enumerate(sites):
        _offer(queue, choices, site, taken[site], room)
    while queue:
        _, site, index = heapq.heappop(queue)
        choices, present = sites[site], taken[site]
        extra = float(choices.costs[index] - choices.costs[present])
        if choices.losses[index] < choices.losses[present] and extra <= room:
            taken[site] = index
            room -= extra
        if extra > room or taken[site] == index:
            _offer(queue, choices, site, taken[site], room)
    return taken


def _offer(
    queue: list[tuple[float, int, int]], choices: SiteChoices, site: int, present: int, room: float
) -> None:
    """Put the best affordable exchange of a site into the queue."""
    saved, extra = choices.losses[present] - choices.losses, choices.costs - choices.costs[present]
    useful = np.flatnonzero((saved > 0) & (extra <= room))
    if len(useful):
        worth = saved[useful] / np.maximum(extra[useful], 1e-30)
        best = int(useful[worth.argmax()])
        heapq.heappush(queue, (-float(worth.max()), site, best))


def _runner_up(choices: SiteChoices, taken: int, multiplier: float) -> int:
    score = choices.losses + multiplier * choices.costs
    others = np.delete(np.arange(len(score)), taken)
    return int(others[score[others].argmin()]) if len(others) else taken

"""The allocation against brute force, and its refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rk_export.passes.numerics.allocation import SiteChoices, allocate


def _sites(seed: int, count: int = 5, candidates: int = 4) -> list[SiteChoices]:
    generator = np.random.default_rng(seed)
    return [
        SiteChoices(generator.integers(1, 20, candidates).astype(float), generator.random(candidates))
        for _ in range(count)
    ]


def _best(sites: list[SiteChoices], budget: float) -> float:
    losses = [
        sum(float(choices.losses[index]) for choices, index in zip(sites, taken, strict=True))
        for taken in itertools.product(*(range(len(choices.costs)) for choices in sites))
        if sum(choices.costs[index] for choices, index in zip(sites, taken, strict=True)) <= budget
    ]
    return min(losses)


@pytest.mark.parametrize("seed", range(20))
def test_within_budget_and_near_the_optimum(seed: int) -> None:
    sites = _sites(seed)
    budget = sum(float(np.median(choices.costs)) for choices in sites)
    allocated = allocate(sites, budget)
    assert allocated.cost <= budget
    assert allocated.cost == sum(
        choices.costs[index] for choices, index in zip(sites, allocated.taken, strict=True)
    )
    # The gap of such a choice is at most the loss range of one site.
    assert (
        allocated.loss <= _best(sites, budget) + max(float(np.ptp(choices.losses)) for choices in sites) / 2
    )


def test_convex_candidates_are_chosen_exactly() -> None:
    costs = np.arange(1.0, 6.0)
    sites = [SiteChoices(costs, weight / costs) for weight in (1.0, 4.0, 9.0)]
    assert allocate(sites, 11).loss == pytest.approx(_best(sites, 11))


def test_all_the_budget_gives_the_least_loss_at_the_least_cost() -> None:
    choices = SiteChoices(np.array([1.0, 5.0, 9.0]), np.array([3.0, 0.0, 0.0]))
    allocated = allocate([choices], 100)
    assert allocated.taken == (1,)
    assert allocated.multiplier == 0


def test_what_is_left_is_spent_off_the_hull() -> None:
    # The middle candidate lies above the line between the others: no multiplier takes it.
    choices = SiteChoices(np.array([0.0, 5.0, 10.0]), np.array([10.0, 6.0, 0.0]))
    assert allocate([choices], 7).taken == (1,)


def test_the_runner_up_is_the_next_best_at_the_multiplier() -> None:
    sites = [SiteChoices(np.array([1.0, 2.0, 9.0]), np.array([5.0, 1.0, 0.9])) for _ in range(3)]
    allocated = allocate(sites, 6)
    assert allocated.taken == (1, 1, 1)
    assert allocated.runner_up == (2, 2, 2) or allocated.runner_up == (0, 0, 0)
    assert allocate([SiteChoices(np.array([1.0]), np.array([0.0]))], 1).runner_up == (0,)


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="cheapest candidates cost 5"):
        allocate([SiteChoices(np.array([5.0, 6.0]), np.array([1.0, 0.0]))], 4)


def test_what_multipliers_miss_is_found_from_a_start() -> None:
    """One exchange is worth most per cost and leaves too little for two others that save more together."""
    sites = [
        SiteChoices(np.array([0.0, cost]), np.array([10.0, loss]))
        for cost, loss in ((6, 3), (5, 4.5), (5, 4.5))
    ]
    assert allocate(sites, 10.0).taken == (1, 0, 0)
    assert allocate(sites, 10.0, [0, 1, 1]).taken == (0, 1, 1)
    assert allocate(sites, 10.0, [1, 1, 0]).taken == (1, 0, 0)  # too expensive
    assert allocate(sites, 11.0, [0, 1, 1]).taken == (1, 1, 0)  # no better

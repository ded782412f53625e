"""The auction against brute force, and its refusals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rk_export.passes.numerics.auction import Lot, auction


def _lots(seed: int, sites: int = 5, candidates: int = 4) -> list[Lot]:
    generator = np.random.default_rng(seed)
    return [
        Lot(generator.integers(1, 20, candidates).astype(float), generator.random(candidates))
        for _ in range(sites)
    ]


def _best(lots: list[Lot], budget: float) -> float:
    losses = [
        sum(float(lot.losses[index]) for lot, index in zip(lots, taken, strict=True))
        for taken in itertools.product(*(range(len(lot.costs)) for lot in lots))
        if sum(lot.costs[index] for lot, index in zip(lots, taken, strict=True)) <= budget
    ]
    return min(losses)


@pytest.mark.parametrize("seed", range(20))
def test_within_budget_and_near_the_optimum(seed: int) -> None:
    lots = _lots(seed)
    budget = sum(float(np.median(lot.costs)) for lot in lots)
    choice = auction(lots, budget)
    assert choice.cost <= budget
    assert choice.cost == sum(lot.costs[index] for lot, index in zip(lots, choice.taken, strict=True))
    # The gap of such a choice is at most the loss range of one site.
    assert choice.loss <= _best(lots, budget) + max(float(np.ptp(lot.losses)) for lot in lots) / 2


def test_convex_candidates_are_chosen_exactly() -> None:
    costs = np.arange(1.0, 6.0)
    lots = [Lot(costs, weight / costs) for weight in (1.0, 4.0, 9.0)]
    assert auction(lots, 11).loss == pytest.approx(_best(lots, 11))


def test_all_the_budget_buys_the_least_loss_at_the_least_cost() -> None:
    lot = Lot(np.array([1.0, 5.0, 9.0]), np.array([3.0, 0.0, 0.0]))
    choice = auction([lot], 100)
    assert choice.taken == (1,)
    assert choice.price == 0


def test_what_is_left_is_spent_off_the_hull() -> None:
    # The middle candidate lies above the line between the others: no price takes it.
    lot = Lot(np.array([0.0, 5.0, 10.0]), np.array([10.0, 6.0, 0.0]))
    assert auction([lot], 7).taken == (1,)


def test_the_runner_up_is_the_next_best_at_the_price() -> None:
    lots = [Lot(np.array([1.0, 2.0, 9.0]), np.array([5.0, 1.0, 0.9])) for _ in range(3)]
    choice = auction(lots, 6)
    assert choice.taken == (1, 1, 1)
    assert choice.runner_up == (2, 2, 2) or choice.runner_up == (0, 0, 0)
    assert auction([Lot(np.array([1.0]), np.array([0.0]))], 1).runner_up == (0,)


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="cheapest candidates cost 5"):
        auction([Lot(np.array([5.0, 6.0]), np.array([1.0, 0.0]))], 4)

"""Budgets over many candidates: the projection against a quadratic program, the largest scores against a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from rk_export.passes.numerics.knapsack import largest_within, logistic_probabilities, project_to_budget


def _candidates(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    s = 1.5 * torch.rand(count, generator=generator) - 0.25
    prices = torch.where(torch.rand(count, generator=generator) < 0.2, 40.0, 1.0)
    return s, prices


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_projection_solves_the_quadratic_program(share: float) -> None:
    s, prices = _candidates(12)
    budget = share * float(prices @ s.clamp(0, 1))
    found, multiplier = project_to_budget(s, prices, budget)
    p, x = prices.double().numpy(), s.double().numpy()
    solved = minimize(
        lambda t: ((t - x) ** 2).sum(),
        np.zeros(12),
        jac=lambda t: 2 * (t - x),
        bounds=[(0, 1)] * 12,
        constraints={"type": "ineq", "fun": lambda t: budget - p @ t, "jac": lambda t: -p},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    np.testing.assert_allclose(found.numpy(), solved.x, atol=1e-4)
    assert multiplier > 0


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 300), share=st.floats(0, 1.2))
def test_projection_meets_the_budget_and_no_less(seed: int, count: int, share: float) -> None:
    s, prices = _candidates(count, seed)
    inside = s.clamp(0, 1)
    budget = share * float(prices.double() @ inside.double())
    found, multiplier = project_to_budget(s, prices, budget)
    cost = float(prices.double() @ found.double())
    assert cost <= budget * (1 + 1e-6) + 1e-4
    if multiplier == 0:
        torch.testing.assert_close(found, inside)
    else:
        assert cost >= budget * (1 - 1e-5) - 1e-3
        torch.testing.assert_close(found, (s - multiplier * prices).clamp(0, 1))


def test_projection_leaves_what_fits_and_refuses_nonsense() -> None:
    s, prices = torch.tensor([0.2, -1.0, 3.0]), torch.ones(3)
    found, multiplier = project_to_budget(s, prices, 1.5)
    assert (found.tolist(), multiplier) == (pytest.approx([0.2, 0.0, 1.0]), 0.0)
    assert not project_to_budget(s, prices, 0.0)[0].any()
    with pytest.raises(ValueError, match="budget"):
        project_to_budget(s, prices, -1.0)
    with pytest.raises(ValueError, match="price"):
        project_to_budget(s, torch.tensor([1.0, 0.0, 1.0]), 1.0)


def _plain(scores: list[float], prices: list[float], budget: float) -> list[bool]:
    """The definition: down the list, take the prefix that fits; go on with what is cheap enough; again."""
    taken = [False] * len(scores)
    order = sorted((i for i, x in enumerate(scores) if x > -float("inf")), key=lambda i: -scores[i])
    order = [i for i in order if prices[i] <= budget]
    while order:
        for place, index in enumerate(order):
            if prices[index] > budget:
                order = [i for i in order[place:] if prices[i] <= budget]
                break
            taken[index] = True
            budget -= prices[index]
        else:
            return taken
    return taken


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(
        st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, -float("inf")]), st.floats(-1e6, 1e6, width=32)
        ),
        min_size=1,
        max_size=60,
    ),
    seed=st.integers(0, 100),
    share=st.floats(0, 1.1),
)
def test_largest_scores_agree_with_a_plain_loop(scores: list[float], seed: int, share: float) -> None:
    prices = _candidates(len(scores), seed)[1]
    budget = share * float(prices.sum())
    found = largest_within(torch.tensor(scores), prices, budget)
    assert found.tolist() == _plain(scores, prices.tolist(), budget)
    assert float(prices[found].sum()) <= budget


def test_largest_scores_among_neighbours_that_share_their_upper_bits() -> None:
    scores = 1 + torch.arange(1000.0)[torch.randperm(1000, generator=torch.Generator().manual_seed(1))] * 1e-6
    found = largest_within(scores, torch.ones(1000), 250.0)
    assert int(found.sum()) == 250
    assert float(scores[found].min()) > float(scores[~found].max())


def test_candidates_of_no_score_are_never_taken() -> None:
    scores = torch.tensor([-torch.inf, 1.0])
    assert largest_within(scores, torch.ones(2), 10.0).tolist() == [False, True]


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_logistic_probabilities_cost_the_budget_in_the_scores_order(temperature: float) -> None:
    scores, prices = torch.randn(2000, generator=torch.Generator().manual_seed(2)), _candidates(2000)[1]
    budget = 0.3 * float(prices.sum())
    s = logistic_probabilities(scores, prices, budget, temperature)
    assert float(prices @ s) == pytest.approx(budget, rel=1e-3)
    of_entries = s[prices == 1][scores[prices == 1].argsort()]
    assert bool((of_entries.diff() >= 0).all())
    doubtful = float(((s > 0.1) & (s < 0.9)).float().mean())
    assert doubtful < 0.1 if temperature < 0.1 else doubtful > 0.3

"""Alternating sparse and low rank under the inputs: counts, normal equations, optima, and errors that never rise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rk_export.passes.numerics.sslc import (
    Target,
    best_low_rank,
    column_costs,
    dropped_losses,
    falling_counts,
    improved_low_rank,
    refit_entries,
    squared_error,
)

OUT, IN = 14, 10


def _moment(seed: int = 1, size: int = IN) -> Tensor:
    root = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / size


def _matrix_of(rows: int, columns: int, seed: int = 3) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _matrix(seed: int = 3) -> Tensor:
    return _matrix_of(OUT, IN, seed)


def _target() -> Target:
    return Target(_matrix(), _moment(), torch.ones(OUT))


def _mask(seed: int = 4) -> Tensor:
    return torch.rand(OUT, IN, generator=torch.Generator().manual_seed(seed)) < 0.4


def test_the_error_is_that_of_the_outputs() -> None:
    x = torch.randn(50, IN, generator=torch.Generator().manual_seed(5))
    E = _matrix()
    expected = float((x @ E.T).square().sum(1).mean())
    assert squared_error(E, x.T @ x / 50) == pytest.approx(expected, rel=1e-5)


def test_column_costs_are_what_others_cannot_make_up_for() -> None:
    C = _moment()
    costs = column_costs(C)
    for column in range(IN):
        others = [place for place in range(IN) if place != column]
        explained = C[column, others] @ torch.linalg.solve(C[others][:, others], C[others, column])
        assert float(costs[column]) == pytest.approx(float(C[column, column] - explained), rel=1e-3)
    with pytest.raises(ValueError, match="positive definite"):
        column_costs(-C)


def test_one_entry_that_goes_loses_its_cost() -> None:
    target = _target()
    mask = torch.ones_like(target.W, dtype=torch.bool)
    mask[4, 7] = False
    S = refit_entries(target.W, target.C, mask, target.W, steps=2 * IN)
    expected = float(target.W[4, 7].square() * target.columns[7])
    assert squared_error(target.W - S, target.C) == pytest.approx(expected, rel=1e-3)
    costs = target.columns.expand(OUT, IN)
    losses = dropped_losses(target.W, costs, [OUT * IN, OUT * IN - 1, 0])
    weighed = target.W.square() * costs
    assert losses.tolist() == pytest.approx([0.0, float(weighed.min()), float(weighed.sum())], rel=1e-4)


def test_refitted_entries_solve_the_normal_equations() -> None:
    R, C, mask = _matrix(), _moment(), _mask()
    S = refit_entries(R, C, mask, torch.zeros_like(R), steps=IN)
    assert not S[~mask].any()
    left = ((R - S) @ C)[mask]
    assert float(left.abs().max()) < 1e-4 * float((R @ C).abs().max())
    for row in range(OUT):
        places = mask[row]
        solved = torch.linalg.solve(C[places][:, places], C[places] @ R[row])
        torch.testing.assert_close(S[row, places], solved, rtol=1e-3, atol=1e-4)


def test_every_step_of_the_refit_lowers_the_error_or_leaves_it() -> None:
    R, C, mask = _matrix(), _moment(), _mask()
    start = R * mask
    errors = [squared_error(R - refit_entries(R, C, mask, start, steps), C) for steps in range(2 * IN)]
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_a_solved_row_and_an_empty_one_stay() -> None:
    R, C = _matrix(), _moment()
    mask = torch.ones_like(R, dtype=torch.bool)
    mask[0] = False
    S = refit_entries(R, C, mask, R * mask, steps=5)
    torch.testing.assert_close(S, R * mask)


@pytest.mark.parametrize("rank", [1, 4, IN])
def test_the_whitened_decomposition_is_the_optimum_beside_entries(rank: int) -> None:
    R, C = _matrix() * ~_mask(), _moment()
    up, down = best_low_rank(R, C, rank)
    values, vectors = torch.linalg.eigh(C.double())
    root = vectors * values.sqrt() @ vectors.T
    tail = torch.linalg.svdvals(R.double() @ root)[rank:].square().sum()
    assert (up.shape, down.shape) == ((OUT, rank), (rank, IN))
    error = squared_error(R - up @ down, C)
    assert error == pytest.approx(float(tail), rel=1e-4, abs=1e-5)
    better = improved_low_rank(R, C, down)
    assert squared_error(R - better[0] @ better[1], C) == pytest.approx(error, rel=1e-4, abs=1e-5)


def test_an_improved_low_rank_part_approaches_the_optimum() -> None:
    R, C = _matrix(), _moment()
    up, down = best_low_rank(R, C, 3)
    least = squared_error(R - up @ down, C)
    down = torch.randn(3, IN, generator=torch.Generator().manual_seed(6))
    errors = []
    for _ in range(60):
        up, down = improved_low_rank(R, C, down)
        errors.append(squared_error(R - up @ down, C))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    assert errors[-1] == pytest.approx(least, rel=1e-2)


def test_a_moment_without_a_root_is_refused() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        best_low_rank(_matrix(), -torch.eye(IN), 2)


@pytest.mark.parametrize(("rank", "entries"), [(0, 0), (0, 70), (3, 0), (3, 41), (IN, 20), (2, OUT * IN)])
def test_counts_are_exact(rank: int, entries: int) -> None:
    fit = _target().fitted(falling_counts(OUT * IN, entries, 3), rank)
    parts = fit.parts()
    assert (parts.rank, parts.entries) == (rank, entries)
    torch.testing.assert_close(parts.dense(), fit.dense())


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_the_error_never_rises_over_rounds(rank: int) -> None:
    target = _target()
    *_, fit = target.stages([100, 60], rank)
    errors = [squared_error(target.W - fit.dense(), target.C)]
    for _ in range(12):
        fit = target.refitted(fit)
        errors.append(squared_error(target.W - fit.dense(), target.C))
    assert all(after <= before * (1 + 1e-5) for before, after in pairwise(errors))
    if rank:
        assert errors[-1] < errors[0]


def test_entries_end_at_their_normal_equations() -> None:
    target = _target()
    fit = target.fitted([60], 2)
    left = (target.W - fit.dense()) @ target.C
    assert float(left[fit.mask].abs().max()) < 1e-4 * float((target.W @ target.C).abs().max())


def test_stages_take_away_and_never_bring_back() -> None:
    counts = falling_counts(OUT * IN, 30, 4)
    fits = list(_target().stages(counts, 2))
    assert [int(fit.mask.sum()) for fit in fits] == counts
    assert all(not (after.mask & ~before.mask).any() for before, after in pairwise(fits))


def test_counts_fall_to_the_last() -> None:
    assert falling_counts(100, 20, 1) == [20]
    assert falling_counts(100, 20, 2) == [40, 20]
    assert falling_counts(100, 100, 3) == [100, 100, 100]


def test_rows_that_weigh_nothing_keep_nothing() -> None:
    rows = torch.ones(OUT)
    rows[:4] = 0
    fit = Target(_matrix(), _moment(), rows).fitted([50])
    assert not fit.mask[:4].any()


def test_more_stages_leave_less_error() -> None:
    errors = []
    for stages in (1, 4):
        target = Target(_matrix_of(60, 40), _moment(size=40), torch.ones(60))
        fit = target.fitted(falling_counts(2400, 800, stages))
        errors.append(squared_error(target.W - fit.dense(), target.C))
    assert errors[1] < errors[0]


def test_planted_parts_are_found() -> None:
    generator = torch.Generator().manual_seed(7)
    low = 0.1 * torch.randn(40, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    sparse = 8 * torch.randn(40, 30, generator=generator) * (torch.rand(40, 30, generator=generator) < 0.05)
    W = low + sparse
    fit = Target(W, _moment(size=30), torch.ones(40)).fitted(falling_counts(1200, 160, 4), 2)
    assert squared_error(W - fit.dense(), _moment(size=30)) < 1e-2 * squared_error(low, _moment(size=30))


def test_both_parts_beat_either_alone_on_a_matrix_of_both() -> None:
    generator = torch.Generator().manual_seed(8)
    W = torch.randn(60, 2, generator=generator) @ torch.randn(2, 50, generator=generator)
    W += torch.randn(60, 50, generator=generator) ** 3  # few of them large
    target, amount = Target(W, _moment(size=50), torch.ones(60)), 1500
    fits = [
        target.fitted(falling_counts(3000, entries, 3), rank)
        for rank, entries in ((2, amount - 2 * 110), (0, amount), (amount // 110, 0))
    ]
    both, alone, low = (squared_error(W - fit.dense(), target.C) for fit in fits)
    assert both < 0.9 * min(alone, low)

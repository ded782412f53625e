"""Alternating sparse and low rank under the inputs: counts, normal equations, optima, and errors that never rise."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rk_export.passes.numerics.sslc import (
    alternate,
    best_low_rank,
    improved_low_rank,
    largest_in_rows,
    refit_entries,
    squared_error,
)

OUT, IN = 14, 10


def _moment(seed: int = 1, size: int = IN) -> Tensor:
    root = torch.randn(size, 3 * size, generator=torch.Generator().manual_seed(seed))
    return root @ root.T / size


def _matrix(seed: int = 3) -> Tensor:
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed))


def _mask(seed: int = 4) -> Tensor:
    return torch.rand(OUT, IN, generator=torch.Generator().manual_seed(seed)) < 0.4


def test_the_error_is_that_of_the_outputs() -> None:
    x = torch.randn(50, IN, generator=torch.Generator().manual_seed(5))
    E = _matrix()
    expected = float((x @ E.T).square().sum(1).mean())
    assert squared_error(E, x.T @ x / 50) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("count", [0, 1, OUT, 3 * OUT + 5, OUT * IN - 1, OUT * IN])
def test_rows_keep_their_largest_entries_alike(count: int) -> None:
    scores = _matrix().abs()
    mask = largest_in_rows(scores, count)
    kept = mask.sum(1)
    assert int(mask.sum()) == count
    assert int(kept.max() - kept.min()) <= 1
    for row, chosen in zip(scores, mask, strict=True):
        if bool(chosen.any()) and not bool(chosen.all()):
            assert float(row[chosen].min()) >= float(row[~chosen].max())


@pytest.mark.parametrize("count", [-1, OUT * IN + 1])
def test_more_entries_than_there_are_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match="entries"):
        largest_in_rows(_matrix(), count)


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
def test_counts_are_exact_and_the_error_never_rises(rank: int, entries: int) -> None:
    W, C = _matrix(), _moment()
    fit = alternate(W, C, rank, entries)
    parts = fit.parts()
    assert (parts.rank, parts.entries) == (rank, entries)
    torch.testing.assert_close(parts.dense(), fit.dense())
    assert all(after <= before * (1 + 1e-5) + 1e-6 for before, after in pairwise(fit.errors))
    assert fit.errors[-1] == pytest.approx(squared_error(W - parts.dense(), C), rel=1e-3, abs=1e-5)


def test_planted_parts_are_found() -> None:
    generator = torch.Generator().manual_seed(7)
    low = torch.randn(40, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    sparse = 8 * torch.randn(40, 30, generator=generator) * (torch.rand(40, 30, generator=generator) < 0.05)
    W, C = low + sparse, _moment(size=30)
    fit = alternate(W, C, 2, 4 * 40, rounds=60)
    assert squared_error(W - fit.dense(), C) < 1e-3 * squared_error(W, C)


def test_alternation_beats_either_part_alone_on_a_matrix_of_both() -> None:
    generator = torch.Generator().manual_seed(8)
    W = torch.randn(24, 2, generator=generator) @ torch.randn(2, 20, generator=generator)
    W += torch.randn(24, 20, generator=generator) ** 3  # few of them large
    C, amount = _moment(size=20), 240
    both = alternate(W, C, 2, amount - 2 * 44)
    alone = alternate(W, C, 0, amount)
    low = alternate(W, C, amount // 44, 0)
    assert both.errors[-1] < min(alone.errors[-1], low.errors[-1])

"""Ranks against the formulas and shapes of the paper (2402.16319), and against hand-made spectra."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rk_export.passes.numerics.ranks import (
    break_even_rank,
    effective_rank,
    gavish_donoho_rank,
    kept_ratio,
    rank_of_energy,
    rank_of_ratio,
    round_rank,
    spectrum,
    stable_rank,
)

LLAMA_7B = {"qk": (4096, 4096 + 4096, 1.5), "gate_up": (4096, 11008 + 11008, 1.186)}


@pytest.mark.parametrize("group", LLAMA_7B)
def test_full_rank_keeps_what_the_paper_says(group: str) -> None:
    columns, rows, kept = LLAMA_7B[group]
    assert kept_ratio(4096, columns, rows) == pytest.approx(kept, abs=1e-3)


def test_break_even_on_llama_shapes() -> None:
    assert break_even_rank(4096, 8192) == 2730
    assert break_even_rank(4096, 4096) == 2048


@given(st.floats(0.01, 0.99), st.integers(16, 5000), st.integers(16, 5000))
def test_the_rank_of_a_ratio_is_the_largest_that_fits(keep: float, columns: int, rows: int) -> None:
    rank = rank_of_ratio(keep, columns, rows)
    assert kept_ratio(rank, columns, rows) <= keep + 1e-12
    assert kept_ratio(rank + 1, columns, rows) > keep - 1e-12


@pytest.mark.parametrize(("energy", "rank"), [(0.1, 1), (16 / 30, 1), (0.6, 2), (29 / 30, 3), (1.0, 4)])
def test_energy_counts_squared_singular_values(energy: float, rank: int) -> None:
    assert rank_of_energy(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), energy) == rank


def test_energy_of_a_low_rank_spectrum_ignores_the_zeros() -> None:
    assert rank_of_energy(torch.tensor([2.0, 1.0, 0.0, 0.0]), 1.0) == 2


@pytest.mark.parametrize(
    ("rank", "multiple", "largest", "expected"),
    [
        (100, 64, 512, 64),
        (128, 64, 512, 128),
        (127, 1, 512, 127),
        (10, 64, 512, 64),
        (10, 64, 40, 40),
        (60, 8, 57, 56),
    ],
)
def test_ranks_round_down_but_never_to_nothing(rank: int, multiple: int, largest: int, expected: int) -> None:
    assert round_rank(rank, multiple, largest) == expected


def test_effective_and_stable_rank_of_flat_and_single_spectra() -> None:
    assert effective_rank(torch.ones(16)) == pytest.approx(16, rel=1e-5)
    assert stable_rank(torch.ones(16)) == pytest.approx(16)
    single = torch.tensor([5.0, 0.0, 0.0])
    assert effective_rank(single) == pytest.approx(1)
    assert stable_rank(single) == pytest.approx(1)
    two = torch.tensor([3.0, 1.0], dtype=torch.float64)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(two) == pytest.approx(math.exp(entropy))
    assert stable_rank(two) == pytest.approx(10 / 9)


@pytest.mark.parametrize("values", [[0.0] * 4, [1e25] * 4, [1e-25] * 4, [1e30, 1e-30, 1e-30, 1e-30]])
def test_no_spectrum_gives_nan(values: list[float]) -> None:
    """Zero matrices, and those whose squares overflow or vanish in float32."""
    found = spectrum("x", torch.tensor(values), None)
    flat = values[0] == values[-1] > 0
    expected = 4.0 if flat else float(values[0] > 0)
    assert found.effective_rank == pytest.approx(expected, rel=1e-5)
    assert found.stable_rank == pytest.approx(expected)
    assert found.energy_rank_99 == (4 if flat else 1)
    assert found.gavish_donoho_rank == 1


def test_gavish_donoho_finds_the_planted_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200, 200, generator=generator, dtype=torch.float64)
    left, right = (torch.randn(200, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    assert gavish_donoho_rank(torch.linalg.svdvals(left @ right.T + noise)) == 5
    assert gavish_donoho_rank(torch.linalg.svdvals(noise)) == 1

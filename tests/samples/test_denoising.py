"""Truncation of a noisy matrix: errors at every rank, and the case in which it must help."""

from __future__ import annotations

import pytest
import torch
from papers.joint_rank.denoising import (
    error_bound,
    gaussian_noise,
    noise_left,
    planted,
    squared_errors_by_rank,
)

from rk_export.passes.numerics.joint_svd import joint_factors, singular_values
from rk_export.passes.numerics.ranks import gavish_donoho_rank


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(11)


@pytest.mark.parametrize("weighed", [False, True])
def test_errors_by_rank_are_those_of_the_products(generator: torch.Generator, weighed: bool) -> None:
    up, down, clean = (
        torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((9, 6), (6, 7), (9, 7))
    )
    inputs = torch.randn(7, 7, dtype=torch.float64, generator=generator)
    second = inputs @ inputs.T if weighed else None
    root = inputs if weighed else torch.eye(7, dtype=torch.float64)
    expected = [float(((up[:, :rank] @ down[:rank] - clean) @ root).square().sum()) for rank in range(1, 7)]
    assert squared_errors_by_rank(up, down, clean, second).tolist() == pytest.approx(expected)


def test_truncation_recovers_a_planted_matrix(generator: torch.Generator) -> None:
    rows, columns, rank = 240, 200, 8
    clean = planted(rows, columns, rank, generator)
    assert float(clean.norm()) == pytest.approx(1)
    assert int(torch.linalg.matrix_rank(clean)) == rank
    noise = gaussian_noise(clean, 0.3, generator)
    assert float(noise.norm()) == pytest.approx(0.3)
    noisy = clean + noise
    assert gavish_donoho_rank(singular_values(noisy)) == rank
    factors = joint_factors(noisy, columns)
    errors = squared_errors_by_rank(factors.up, factors.down, clean).sqrt()
    assert int(errors.argmin()) + 1 == rank
    assert float(errors[rank - 1]) / 0.3 == pytest.approx(noise_left(rank, rows, columns), rel=0.05)
    assert float(errors[rank - 1]) < error_bound(rank, noise)
    assert float(errors[-1]) == pytest.approx(0.3)  # at full rank nothing is taken away


def test_truncation_of_a_flat_clean_matrix_loses(generator: torch.Generator) -> None:
    clean = planted(80, 60, 60, generator)
    noisy = clean + gaussian_noise(clean, 0.2, generator)
    factors = joint_factors(noisy, 60)
    errors = squared_errors_by_rank(factors.up, factors.down, clean).sqrt()
    assert int(errors.argmin()) + 1 == 60
    assert float(errors[30]) > 2 * 0.2

"""The joint factorization against torch.linalg.svd: error, gauges, shapes, precision paths, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rk_export.options.ranks import Gauge
from rk_export.passes.numerics import joint_svd
from rk_export.passes.numerics.eigen import gram_matrix, leading_eigenvectors
from rk_export.passes.numerics.joint_svd import (
    joint_factors,
    orthogonality_defect,
    right_subspace,
    singular_values,
)

SHAPES = [(96, 40), (40, 96), (64, 64), (1, 30), (30, 1)]


def random_matrix(rows: int, columns: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(rows: int, columns: int, values: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random matrix (rows, columns) with the given singular values."""
    size = len(values)
    left = torch.linalg.qr(random_matrix(rows, size, seed=1)).Q
    right = torch.linalg.qr(random_matrix(columns, size, seed=2)).Q
    return ((left * values) @ right.T).to(dtype)


def residual(W: Tensor, factors: joint_svd.Factors) -> float:
    """Return the measured Frobenius norm of W - B A, computed in float64."""
    return float(torch.linalg.norm(W.double() - factors.up.double() @ factors.down.double()))


def best_error(W: Tensor, rank: int) -> float:
    """Return the error of the best rank-k approximation, from the singular values that PyTorch computes."""
    return float(torch.linalg.svdvals(W.double())[rank:].square().sum().sqrt())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_error_is_that_of_the_svd(shape: tuple[int, int], share: float) -> None:
    W = random_matrix(*shape)
    rank = max(1, int(share * min(shape)))
    factors = joint_factors(W, rank)
    expected = best_error(W, rank)
    assert factors.down.shape == (rank, shape[1])
    assert factors.up.shape == (shape[0], rank)
    assert factors.rank == rank
    if expected > 0:
        assert residual(W, factors) == pytest.approx(expected, rel=1e-9)
        assert factors.squared_error**0.5 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", [(900, 400), (400, 700)])
def test_the_float32_path_reaches_the_error_of_the_svd(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    monkeypatch.setattr(joint_svd, "FLOAT64_UP_TO", 256)
    W = random_matrix(*shape, dtype=torch.float32)
    rank = 120
    assert right_subspace(W, rank).basis.dtype == torch.float32
    expected = best_error(W, rank)
    factors = joint_factors(W, rank)
    assert residual(W, factors) == pytest.approx(expected, rel=1e-6)
    assert factors.squared_error**0.5 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("size", "dtype"), [(1024, torch.float64), (1025, torch.float32)])
def test_the_precision_follows_the_size(size: int, dtype: torch.dtype) -> None:
    assert right_subspace(random_matrix(size, size + 8, dtype=torch.float32), 64).basis.dtype == dtype


def test_a_tiny_energy_beyond_the_rank_is_factorized_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_svd, "FLOAT64_UP_TO", 32)
    falling = 10.0 ** -(torch.arange(64, dtype=torch.float64) / 8)
    W = with_spectrum(160, 64, falling)
    assert right_subspace(W, 24).basis.dtype == torch.float64
    assert residual(W.double(), joint_factors(W.double(), 24)) == pytest.approx(best_error(W, 24), rel=1e-6)
    flat = with_spectrum(160, 64, torch.ones(64, dtype=torch.float64))
    assert right_subspace(flat, 24).basis.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_both_gauges_have_the_same_product(shape: tuple[int, int]) -> None:
    W = random_matrix(*shape)
    rank = max(1, min(shape) // 2)
    orthogonal, balanced = (joint_factors(W, rank, gauge=gauge) for gauge in ("orthogonal", "balanced"))
    torch.testing.assert_close(
        balanced.up @ balanced.down, orthogonal.up @ orthogonal.down, rtol=0, atol=1e-12 * float(W.norm())
    )
    assert balanced.squared_error == pytest.approx(orthogonal.squared_error, abs=1e-12)


def test_the_orthogonal_gauge_has_orthonormal_rows_and_the_balanced_one_shares_the_range() -> None:
    W = with_spectrum(90, 50, torch.linspace(9, 1, 50, dtype=torch.float64), dtype=torch.float64)
    orthogonal, balanced = (joint_factors(W, 20, gauge=gauge) for gauge in ("orthogonal", "balanced"))
    assert orthogonality_defect(orthogonal.down) < 1e-12
    assert orthogonality_defect(balanced.down) > 1
    torch.testing.assert_close(balanced.up.norm(dim=0), balanced.down.norm(dim=1))
    torch.testing.assert_close(orthogonal.up.norm(dim=0), singular_values(W)[:20])


@pytest.mark.parametrize("gauge", ["orthogonal", "balanced"])
def test_zero_and_rank_deficient_matrices_give_finite_factors(gauge: Gauge) -> None:
    zero = joint_factors(torch.zeros(12, 8), 3, gauge=gauge)
    assert zero.squared_error == 0
    assert torch.count_nonzero(zero.up @ zero.down) == 0
    for shape in ((30, 20), (20, 30)):
        W = random_matrix(shape[0], 2) @ random_matrix(2, shape[1], seed=1)
        factors = joint_factors(W, 6, gauge=gauge)
        assert torch.isfinite(factors.up).all()
        assert torch.isfinite(factors.down).all()
        assert residual(W, factors) < 1e-6 * float(W.norm())


def test_factors_keep_the_dtype_and_own_their_memory() -> None:
    factors = joint_factors(random_matrix(20, 10).to(torch.bfloat16), 4)
    assert factors.up.dtype == factors.down.dtype == torch.bfloat16
    assert factors.up.is_contiguous()
    assert factors.down.is_contiguous()


@pytest.mark.parametrize("rank", [0, -1, 11])
def test_an_impossible_rank_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is not between 1 and 10"):
        joint_factors(random_matrix(20, 10), rank)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_singular_values_and_gram_matrix(shape: tuple[int, int]) -> None:
    W = random_matrix(*shape)
    torch.testing.assert_close(singular_values(W), torch.linalg.svdvals(W))
    torch.testing.assert_close(gram_matrix(W).tril(), (W.T @ W).tril())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 17, 40])
def test_leading_eigenvectors_are_those_of_the_whole_matrix(size: int, dtype: torch.dtype) -> None:
    gram = (lambda W: W.T @ W)(random_matrix(size + 5, size)).to(dtype)
    reference = torch.linalg.eigh(gram)
    for count in {1, (size + 1) // 2, size}:
        values, vectors = leading_eigenvectors(gram.tril(), count)
        torch.testing.assert_close(values, reference.eigenvalues, rtol=1e-4, atol=1e-4)
        assert vectors.shape == (size, count)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(count, dtype=dtype), rtol=0, atol=1e-5)
        torch.testing.assert_close(gram @ vectors, vectors * values[size - count :], rtol=1e-4, atol=1e-3)


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 2**16))
def test_the_error_falls_with_the_rank_and_full_rank_is_exact(rows: int, columns: int, seed: int) -> None:
    W = random_matrix(rows, columns, seed=seed)
    full = min(rows, columns)
    errors = [residual(W, joint_factors(W, rank)) for rank in range(1, full + 1)]
    norm = float(W.norm())
    assert all(later <= earlier + 1e-12 * norm for earlier, later in itertools.pairwise(errors))
    assert errors[-1] <= 1e-7 * norm
    assert joint_factors(W, full).squared_error <= 1e-12 * norm**2

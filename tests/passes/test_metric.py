"""Factorization under a metric against closed forms and numerical optima in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rk_export.passes.numerics.joint_svd import (
    joint_factors,
    orthogonality_defect,
    right_subspace,
    whitened_singular_values,
)
from rk_export.passes.numerics.metric import DAMPING, FLOAT64_UP_TO, Metric

OUT, IN, TOKENS = 18, 12, 200


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, *, seed: int, rank: int | None = None) -> Tensor:
    """Return a second moment with eigenvalues far apart, of lower rank if asked."""
    X = randn(TOKENS, rank or size, seed=seed) @ randn(rank or size, size, seed=seed + 1)
    X *= 10.0 ** torch.linspace(-2, 2, size, dtype=torch.float64)
    return X.T @ X / TOKENS


def damped(second: Tensor) -> Tensor:
    return second + DAMPING * second.diagonal().mean() * torch.eye(len(second), dtype=torch.float64)


def weighted_norm(E: Tensor, C: Tensor, G: Tensor | None = None) -> float:
    """Return the root of trace(Eᵀ G E C)."""
    left = E if G is None else G @ E
    return float((E.T @ left @ C).trace().clamp_min(0).sqrt())


@pytest.mark.parametrize("rank", [IN, 3])
def test_the_root_is_that_of_the_damped_moment(rank: int) -> None:
    C = moment(IN, seed=0, rank=rank)
    W = randn(OUT, IN, seed=1)
    metric = Metric.of(C)
    assert metric.columns(W).norm() == pytest.approx(weighted_norm(W, damped(C)), rel=1e-12)
    assert metric.rows(W.T).norm() == pytest.approx(weighted_norm(W, damped(C)), rel=1e-12)
    torch.testing.assert_close(metric.unweighted(metric.columns(W)), W, rtol=1e-9, atol=1e-9)


def test_a_diagonal_moment_equals_the_matrix_with_that_diagonal() -> None:
    diagonal, W = moment(IN, seed=0).diagonal().clone(), randn(OUT, IN, seed=1)
    vector, matrix = Metric.of(diagonal), Metric.of(diagonal.diag())
    for name in ("columns", "unweighted"):
        torch.testing.assert_close(getattr(vector, name)(W), getattr(matrix, name)(W))
    X = randn(IN, IN, seed=2)
    torch.testing.assert_close(vector.target(W, X), matrix.target(W, X))


def test_stacked_metrics_are_block_diagonal() -> None:
    first, second = moment(5, seed=0), moment(7, seed=3).diagonal().clone()
    W = randn(OUT, 12, seed=1)
    both = Metric.stacked([Metric.of(first), Metric.of(second)])
    assert both.size == 12
    parts = [Metric.of(first).columns(W[:, :5]), Metric.of(second).columns(W[:, 5:])]
    torch.testing.assert_close(both.columns(W), torch.cat(parts, dim=1))
    torch.testing.assert_close(both.unweighted(both.columns(W)), W)
    with pytest.raises(ValueError, match="one block"):
        both.target(W, torch.eye(12))


def test_a_large_root_is_kept_in_float32() -> None:
    size = FLOAT64_UP_TO + 1
    metric = Metric.of(torch.eye(size))
    assert metric.roots[0].dtype == torch.float32
    assert Metric.of(torch.eye(8)).roots[0].dtype == torch.float64
    assert metric.columns(torch.ones(2, size)).dtype == torch.float32


def test_an_empty_moment_weighs_all_alike() -> None:
    W = randn(OUT, IN, seed=1)
    for zero in (torch.zeros(IN, IN), torch.zeros(IN)):
        torch.testing.assert_close(Metric.of(zero).columns(W), W)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (torch.ones(3, 4), "neither square"),
        (torch.full((3, 3), torch.nan), "not finite"),
        (torch.tensor([1.0, -1.0]), "negative diagonal"),
        (torch.tensor([[1.0, 9.0], [9.0, 1.0]]), "negative eigenvalue"),
    ],
)
def test_what_is_no_second_moment_is_refused(second: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Metric.of(second)


def test_the_weighted_error_is_the_best_one() -> None:
    """By the symmetric root, which the code does not use."""
    W, C = randn(OUT, IN, seed=1), moment(IN, seed=0)
    values, vectors = torch.linalg.eigh(damped(C))
    whitened = torch.linalg.svdvals(W @ (vectors * values.sqrt()) @ vectors.T)
    torch.testing.assert_close(whitened_singular_values(W, Metric.of(C)), whitened)
    for rank in (1, 5, 11):
        factors = joint_factors(W, rank, inputs=Metric.of(C))
        error = W - factors.up @ factors.down
        best = float(whitened[rank:].norm())
        assert weighted_norm(error, damped(C)) == pytest.approx(best, rel=1e-8)
        assert factors.weighted_error == pytest.approx(best / float(whitened.norm()), rel=1e-8)
        assert factors.squared_error == pytest.approx(float(error.square().sum()), rel=1e-8)
        plain = joint_factors(W, rank)
        assert weighted_norm(W - plain.up @ plain.down, damped(C)) > 1.05 * best


@pytest.mark.parametrize("diagonal", [False, True])
def test_both_metrics_together(diagonal: bool) -> None:
    W, C = randn(OUT, IN, seed=1), moment(IN, seed=0)
    blocks = [moment(10, seed=5), moment(8, seed=6)]
    if diagonal:
        blocks = [block.diagonal().clone() for block in blocks]
    G = torch.block_diag(*(damped(b.diag() if b.ndim == 1 else b) for b in blocks))
    outputs = Metric.stacked(Metric.of(block) for block in blocks)
    whitened = torch.linalg.svdvals(torch.linalg.cholesky(G).T @ W @ torch.linalg.cholesky(damped(C)))
    torch.testing.assert_close(whitened_singular_values(W, Metric.of(C), outputs), whitened)
    for rank in (2, 9):
        factors = joint_factors(W, rank, inputs=Metric.of(C), outputs=outputs)
        error = weighted_norm(W - factors.up @ factors.down, damped(C), G)
        assert error == pytest.approx(float(whitened[rank:].norm()), rel=1e-8)
        alone = joint_factors(W, rank, outputs=outputs)
        assert weighted_norm(W - alone.up @ alone.down, torch.eye(IN).double(), G) <= weighted_norm(
            W - factors.up @ factors.down, torch.eye(IN).double(), G
        )


def test_the_corrected_target_is_the_least_squares_map() -> None:
    W, X = randn(OUT, IN, seed=1), randn(TOKENS, IN, seed=2)
    X0 = X @ (torch.eye(IN) + 0.2 * randn(IN, IN, seed=3)) + 0.3 * randn(TOKENS, IN, seed=4)
    C, cross = X.T @ X / TOKENS, X0.T @ X / TOKENS
    metric = Metric.of(C, damping=1e-9)
    full = joint_factors(W, IN, inputs=metric, cross=cross)
    expected = torch.linalg.lstsq(X, X0 @ W.T).solution.T
    torch.testing.assert_close(full.up @ full.down, expected, rtol=1e-6, atol=1e-6)
    for rank in (3, 8):
        corrected = joint_factors(W, rank, inputs=metric, cross=cross)
        ignored = joint_factors(W, rank, inputs=metric)
        errors = [
            float((X0 @ W.T - X @ (factors.up @ factors.down).T).norm()) for factors in (corrected, ignored)
        ]
        assert errors[0] < 0.97 * errors[1]


def test_without_a_shift_the_target_is_the_matrix_itself() -> None:
    W, C = randn(OUT, IN, seed=1), moment(IN, seed=0, rank=4)
    metric = Metric.of(C)
    torch.testing.assert_close(metric.target(W, C), metric.columns(W), rtol=1e-8, atol=1e-8)
    with pytest.raises(ValueError, match="cross moment needs"):
        joint_factors(W, 3, cross=C)


def test_gauges_under_a_metric() -> None:
    W, metric = randn(OUT, IN, seed=1), Metric.of(moment(IN, seed=0))
    orthogonal, balanced = (
        joint_factors(W, 6, gauge=gauge, inputs=metric) for gauge in ("orthogonal", "balanced")
    )
    assert orthogonality_defect(orthogonal.down, metric) < 1e-9
    assert orthogonality_defect(orthogonal.down) > 1e-2
    torch.testing.assert_close(balanced.up.norm(dim=0), balanced.down.norm(dim=1))
    torch.testing.assert_close(balanced.up @ balanced.down, orthogonal.up @ orthogonal.down)


def test_the_float32_path_under_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("joint_svd", "metric"):
        monkeypatch.setattr(f"rk_export.passes.numerics.{module}.FLOAT64_UP_TO", 64)
    W, C = randn(200, 160, seed=1), moment(160, seed=0)
    metric = Metric.of(C)
    assert right_subspace(randn(200, 160, seed=7), 40).basis.dtype == torch.float32
    factors = joint_factors(W.float(), 40, inputs=metric)
    best = torch.linalg.svdvals(W @ torch.linalg.cholesky(damped(C)))[40:].norm()
    error = weighted_norm(W - (factors.up.double() @ factors.down.double()), damped(C))
    assert error == pytest.approx(float(best), rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), tokens=st.integers(1, 20))
def test_the_weighted_error_falls_with_the_rank(seed: int, tokens: int) -> None:
    X, W = randn(tokens, 8, seed=seed), randn(10, 8, seed=seed + 1)
    C = X.T @ X / tokens
    errors = []
    for rank in range(1, 9):
        factors = joint_factors(W, rank, inputs=Metric.of(C))
        errors.append(weighted_norm(W - factors.up @ factors.down, damped(C)))
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 1e-6

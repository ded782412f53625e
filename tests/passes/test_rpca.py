"""Robust principal components: thresholding against LAPACK's SVD, planted matrices, batches, convergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rk_export.passes.numerics.rpca import rpca, soft, thresholded_singular_values

SHAPES = [(40, 40), (72, 40), (40, 72)]


def _planted(m: int, n: int, rank: int = 3, density: float = 0.05, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a low-rank matrix of unit mean square and sparse entries of magnitude 5."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randn(m, rank, generator=generator) @ torch.randn(rank, n, generator=generator) / rank**0.5
    signs = torch.randint(0, 2, (m, n), generator=generator) * 2 - 1
    return low, 5.0 * signs * (torch.rand(m, n, generator=generator) < density)


def _nuclear(X: Tensor) -> float:
    return float(torch.linalg.svdvals(X.double()).sum())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 2.0])
def test_thresholding_agrees_with_a_complete_svd(shape: tuple[int, int], share: float, device: str) -> None:
    X = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    threshold = share * torch.linalg.matrix_norm(X, 2)
    U, sigma, Vh = torch.linalg.svd(X.double(), full_matrices=False)
    expected = (U * (sigma - threshold[:, None]).clamp_min(0)[:, None]) @ Vh
    found = thresholded_singular_values(X.to(device), threshold.to(device)).cpu()
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_soft_threshold() -> None:
    X = torch.tensor([-3.0, -1.0, 0.5, 2.0])
    torch.testing.assert_close(soft(X, torch.tensor(1.0)), torch.tensor([-2.0, 0.0, 0.0, 1.0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_planted_parts_are_recovered(shape: tuple[int, int], device: str) -> None:
    low, sparse = _planted(*shape)
    found = rpca((low + sparse).to(device), 40)
    torch.testing.assert_close(found.low.cpu(), low, rtol=0, atol=1e-3)
    torch.testing.assert_close(found.sparse.cpu(), sparse, rtol=0, atol=1e-3)
    assert torch.linalg.matrix_rank(found.low.double(), rtol=1e-5) == 3
    assert torch.equal(found.sparse.cpu().abs() > 1e-5, sparse != 0)


def test_a_slower_growth_finds_a_better_split() -> None:
    W = torch.randn(48, 32, generator=torch.Generator().manual_seed(3))
    sparsity = 48**-0.5

    def objective(growth: float, iterations: int) -> float:
        split = rpca(W, iterations, growth=growth)
        assert float(split.residuals[-1]) < 1e-4
        return _nuclear(split.low) + sparsity * float(split.sparse.abs().sum())

    slow, default, fast = objective(1.05, 250), objective(1.5, 25), objective(4.0, 10)
    assert slow < default < fast
    assert default < 1.02 * slow


def test_residual_falls_to_a_percent_within_ten_steps() -> None:
    W = torch.randn(3, 64, 96, generator=torch.Generator().manual_seed(4))
    split = rpca(W)
    assert split.residuals.shape == (10, 3)
    assert bool((split.residuals.diff(dim=0)[2:] < 0).all())
    assert float(split.residuals[-1].max()) < 0.01
    gap = torch.linalg.vector_norm(W - split.low - split.sparse, dim=(1, 2)).double()
    torch.testing.assert_close(
        split.residuals[-1], gap / torch.linalg.vector_norm(W, dim=(1, 2)).double(), rtol=1e-3, atol=0
    )


def test_exact_on_the_support() -> None:
    W = torch.randn(32, 48, generator=torch.Generator().manual_seed(5))
    split = rpca(W, 6)
    exact = split.exact_sparse(W)
    kept = split.sparse != 0
    assert bool(kept.any())
    assert not bool(kept.all())
    torch.testing.assert_close((split.low + exact)[kept], W[kept])
    assert not exact[~kept].any()


def test_batched_equals_single(device: str) -> None:
    W = torch.randn(2, 2, 24, 40, generator=torch.Generator().manual_seed(6)).to(device)
    W[0, 1] *= 100
    together = rpca(W, 8)
    assert together.low.shape == W.shape
    for place in ((0, 0), (0, 1), (1, 1)):
        alone = rpca(W[place], 8)
        torch.testing.assert_close(together.low[place], alone.low, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.sparse[place], alone.sparse, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.residuals[:, *place], alone.residuals, rtol=1e-3, atol=1e-7)


def test_a_factor_on_the_matrix_comes_out_as_a_factor() -> None:
    W = torch.randn(24, 40, generator=torch.Generator().manual_seed(7))
    torch.testing.assert_close(rpca(1e3 * W).low, 1e3 * rpca(W).low, rtol=1e-3, atol=1e-1)


def test_zeros_stay_zeros() -> None:
    split = rpca(torch.zeros(4, 6))
    assert not split.low.any()
    assert not split.sparse.any()
    assert not split.residuals.any()


@pytest.mark.parametrize(
    ("W", "options", "message"),
    [
        (torch.zeros(4), {}, "no stack"),
        (torch.full((2, 2), torch.nan), {}, "not finite"),
        (torch.zeros(2, 2), {"iterations": 0}, "0 iterations"),
        (torch.zeros(2, 2), {"growth": 0.5}, "growth 0.5"),
    ],
)
def test_what_cannot_be_split_is_refused(W: Tensor, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rpca(W, **options)  # type: ignore[arg-type]

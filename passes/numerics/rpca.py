"""Robust principal components: a matrix split into low rank and sparse (0912.3599).

The first stage of CAP (2505.03801): minimize |L|_* + λ |S|_1 with L + S = W and λ = 1/√max(m, n), by alternating
directions (1009.5055):

    L ← SVT_{1/μ}(W - S + Y/μ),  S ← soft_{λ/μ}(W - L + Y/μ),  Y ← Y + μ (W - L - S)

Everything scales with W's norm: μ starts at 1.25 / |W|₂ and grows by half at every step, and Y starts at W over
max(|W|₂, |W|_∞ / λ), which is feasible for the dual problem; so a factor on W comes out as a factor on L and S.
A μ that grows brings L + S to W in some ten steps, where a constant one takes hundreds; growing faster ends
sooner at a worse split. It stops growing before thresholds sink into float32's rounding.

Singular values are thresholded through the Gram matrix of the shorter side in float64: X V diag(1 - τ/σ)₊ Vᵀ. Only
directions above τ enter, and τ never falls far below |W|₂, so squaring the spectrum costs no accuracy here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.eigen import gram_matrix, leading_eigenvectors, product
from rk_export.passes.numerics.threads import one_thread

START, GROWTH = 1.25, 1.5
_LARGEST = 1e4  # of μ |W|₂
_TINY = 1e-30


@dataclass(frozen=True)
class Split:
    """W ~ low + sparse.

    Args:
        low: L (..., m, n).
        sparse: S (..., m, n), with zeros where the threshold left nothing.
        residuals: |W - L - S| / |W| after every step, float64 (steps, ...).
    """

    low: Tensor
    sparse: Tensor
    residuals: Tensor

    def exact_sparse(self, W: Tensor) -> Tensor:
        """Return W - L on S' support: there L + S gives W, elsewhere the residual stays out."""
        return (W - self.low) * (self.sparse != 0)


def rpca(W: Tensor, iterations: int = 10, *, start: float = START, growth: float = GROWTH) -> Split:
    """Split matrices into low rank and sparse.

    Args:
        W: (..., m, n), float32 or float64; matrices of one shape, each split by itself.
        iterations: Steps of the alternating directions.
        start: μ |W|₂ at the first step.
        growth: Of μ from one step to the next; 1 leaves it constant.

    Raises:
        ValueError: If W is no stack of matrices, has no finite norm, or a number is out of range.
    """
    if W.ndim < 2 or not W.numel():
        raise ValueError(f"{tuple(W.shape)} is no stack of matrices")
    if iterations < 1 or start <= 0 or growth < 1:
        raise ValueError(f"{iterations} iterations, μ from {start}, growth {growth}")
    if not bool(torch.isfinite(W).all()):
        raise ValueError("the matrix has values that are not finite")
    stack = W.reshape(-1, *W.shape[-2:])
    sparsity = max(stack.shape[1:]) ** -0.5
    spectral = _spectral_norms(stack).clamp_min(_TINY)
    total = torch.linalg.vector_norm(stack, dim=(1, 2), dtype=torch.float64).clamp_min(_TINY)
    largest = stack.abs().amax((1, 2))
    Y = stack / torch.maximum(spectral, largest / sparsity)[:, None, None]
    mu = start / spectral
    low, sparse, residuals = torch.zeros_like(stack), torch.zeros_like(stack), []
    for _ in range(iterations):
        step = 1 / mu
        low = thresholded_singular_values(stack - sparse + Y * step[:, None, None], step)
        sparse = soft(stack - low + Y * step[:, None, None], sparsity * step[:, None, None])
        gap = stack - low - sparse
        Y = Y + gap * mu[:, None, None]
        residuals.append(torch.linalg.vector_norm(gap, dim=(1, 2), dtype=torch.float64) / total)
        mu = torch.minimum(mu * growth, _LARGEST / spectral)
    shape = (iterations, *W.shape[:-2])
    return Split(low.view_as(W), sparse.view_as(W), torch.stack(residuals).view(shape))


def soft(X: Tensor, threshold: Tensor) -> Tensor:
    """Return X with every magnitude lowered by a threshold, down to zero."""
    return X - X.clamp(-threshold, threshold)


@one_thread()
def thresholded_singular_values(X: Tensor, threshold: Tensor) -> Tensor:
    """Return X (matrices, m, n) with every singular value lowered by a threshold (matrices,), down to zero."""
    if X.device.type == "cpu":
        pairs = zip(X, threshold.tolist(), strict=True)
        return torch.stack([_thresholded(matrix, value) for matrix, value in pairs])
    tall = X if X.shape[1] >= X.shape[2] else X.mT
    wide = tall.to(torch.float64)
    values, V = torch.linalg.eigh(wide.mT @ wide)
    kept = V * _shrinkage(values, threshold[:, None].to(torch.float64))[:, None]
    result: Tensor = tall @ (kept @ V.mT).to(X.dtype)
    return result if X.shape[1] >= X.shape[2] else result.mT


def _thresholded(X: Tensor, threshold: float) -> Tensor:
    tall = X if X.shape[0] >= X.shape[1] else X.T
    values, vectors = leading_eigenvectors(gram_matrix(tall), min(X.shape))
    shrinkage = _shrinkage(values, torch.tensor(threshold, dtype=torch.float64))
    count = int((shrinkage > 0).sum())
    V = vectors[:, vectors.shape[1] - count :]
    projector = product(V * shrinkage[len(shrinkage) - count :], V.T)
    result = product(tall.contiguous(), projector.to(X.dtype))
    return result if X.shape[0] >= X.shape[1] else result.T


def _shrinkage(squares: Tensor, threshold: Tensor) -> Tensor:
    """Return (1 - τ/σ)₊ for eigenvalues σ² of a Gram matrix."""
    sigma = squares.clamp_min(_TINY).sqrt()
    return (1 - threshold / sigma).clamp_min(0)


@one_thread()
def _spectral_norms(stack: Tensor) -> Tensor:
    """Return the largest singular value of each matrix (matrices,)."""
    if stack.device.type == "cpu":
        grams = (gram_matrix(X if X.shape[0] >= X.shape[1] else X.T) for X in stack)
        squares = [leading_eigenvectors(gram, 1)[0][-1] for gram in grams]
        return torch.stack(squares).clamp_min(0).sqrt().to(stack.dtype)
    norms: Tensor = torch.linalg.matrix_norm(stack.to(torch.float64), 2)
    return norms.to(stack.dtype)

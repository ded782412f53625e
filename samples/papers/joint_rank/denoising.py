"""When a truncation comes closer to a clean matrix than the noisy one that was truncated (the claim of 2402.16319).

With W' = W* + E and Ŵ_k the best rank-k approximation of W', two effects add up: of the noise about
k (m + n - k) / (m n) of its energy stays, and of W* what lies beyond its rank k is lost. If W* has rank k, the second
is zero and truncation wins: |Ŵ_k - W*| <= 2 sqrt(2k) |E|₂, for the difference has rank at most 2k and |Ŵ_k - W'|₂ is
no larger than |E|₂. If W* has full rank and a flat spectrum, truncation loses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def squared_errors_by_rank(up: Tensor, down: Tensor, clean: Tensor, second: Tensor | None = None) -> Tensor:
    """Return tr((B_k A_k - W*) C (B_k A_k - W*)ᵀ) for k = 1 .. r, B_k and A_k the first k columns and rows.

    All ranks cost about as much as one, since with G = BᵀB and H = A C Aᵀ the squares are sums of G ∘ H over leading
    blocks.

    Args:
        up: B (out, r).
        down: A (r, in).
        clean: W* (out, in).
        second: C (in, in), the second moment of the inputs; None weighs them alike.

    Returns:
        float64 (r,): the mean over inputs of |Ŵ_k x - W* x|².
    """
    B, A, W = (tensor.to(torch.float64) for tensor in (up, down, clean))
    C = torch.eye(A.shape[1], dtype=torch.float64) if second is None else second.to(torch.float64)
    products = (B.T @ B) * (A @ C @ A.T)
    squares = products.cumsum(0).cumsum(1).diagonal()
    weighed = W @ C
    crossed = ((B.T @ weighed) * A).sum(1).cumsum(0)
    return (squares - 2 * crossed + (weighed * W).sum()).clamp_min(0)


def noise_left(rank: int, rows: int, columns: int) -> float:
    """Return the share of the norm of small Gaussian noise that truncation to the clean matrix' rank leaves.

    sqrt(k (m + n - k) / (m n)): what lies in the tangent space of the matrices of rank k, to first order in the noise.
    """
    return math.sqrt(rank * (rows + columns - rank) / (rows * columns))


def error_bound(rank: int, noise: Tensor) -> float:
    """Return 2 sqrt(2k) |E|₂, which |Ŵ_k - W*| never exceeds if W* has rank k; E (m, n)."""
    return 2 * math.sqrt(2 * rank) * float(torch.linalg.matrix_norm(noise.to(torch.float64), 2))


def planted(rows: int, columns: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return a random matrix (rows, columns) of a rank, its singular values equal, of Frobenius norm 1; float64."""
    left, right = (
        torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, generator=generator)).Q
        for size in (rows, columns)
    )
    product: Tensor = left @ right.T / math.sqrt(rank)
    return product


def gaussian_noise(clean: Tensor, size: float, generator: torch.Generator) -> Tensor:
    """Return Gaussian noise like a matrix, of `size` times its Frobenius norm."""
    noise = torch.randn(clean.shape, dtype=clean.dtype, generator=generator)
    return noise * (size * float(clean.norm()) / float(noise.norm()))

"""How far apart two subspaces are, and how far a basis is from orthonormal (2402.16319 calls it the mapping space).

The rows of a factor A (k, n) span what the pair B A can read. Rounding A changes that span as well as the angles
between its rows. The second can be undone by a change of gauge (B L, L^-1 A); the first cannot be undone by any choice
of B, since every B A reads the row space of A alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_basis(A: Tensor) -> Tensor:
    """Return an orthonormal basis (n, k) of the row space of A (k, n), float64; k at most n.

    Raises:
        ValueError: If A has more rows than columns.
    """
    if A.shape[0] > A.shape[1]:
        raise ValueError(f"{A.shape[0]} rows cannot be independent in {A.shape[1]} dimensions")
    basis: Tensor = torch.linalg.qr(A.to(torch.float64).T).Q
    return basis


def principal_angles(A: Tensor, B: Tensor) -> Tensor:
    """Return the principal angles between the row spaces of A (k, n) and B (m, n), ascending, in radians.

    There are min(k, m) of them, float64. Small angles come from their sines and large ones from their cosines, so that
    both are exact (Björck and Golub, 1973).

    Raises:
        ValueError: If a matrix has more rows than columns.
    """
    first, second = row_basis(A), row_basis(B)
    if first.shape[1] < second.shape[1]:
        first, second = second, first
    overlap = first.T @ second  # (larger, smaller)
    cosines = torch.linalg.svdvals(overlap).clamp(0, 1)
    sines = torch.linalg.svdvals(second - first @ overlap).clamp(0, 1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def largest_defect(A: Tensor) -> float:
    """Return the largest absolute entry of AAᵀ - I, zero when the rows of A (k, n) are orthonormal."""
    wide = A.to(torch.float64)
    eye = torch.eye(len(wide), dtype=torch.float64, device=A.device)
    return float((wide @ wide.T - eye).abs().max())

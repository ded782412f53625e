"""Joint rank-k approximation of matrices that read the same input (2402.16319).

Matrices W_i (out_i, in) are stacked on the output axis, W = [W_1; ...; W_n], and W ~ B A with one shared
down-projection A (k, in) and up-projections B_i, the rows of B that belong to W_i.

A full SVD of the stacked matrix is never taken when it is taller than wide: the right singular subspace is
that of the (in, in) Gram matrix, and W projected on it is the best rank-k approximation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.options import Gauge
from rk_export.passes.numerics.eigen import eigenvalues, gram_matrix, leading_eigenvectors, product

# Up to this size float64 costs little. Beyond, float32 misplaces the subspace by an energy of order
# (1e-7)² n log n times the largest eigenvalue, so it serves unless the energy beyond the rank is tiny.
FLOAT64_UP_TO = 1024
FLOAT32_TAIL = 1e-2


@dataclass(frozen=True)
class Factors:
    """W ~ up @ down.

    Args:
        down: A (k, in), the shared down-projection.
        up: B (out, k), the stacked up-projections.
        squared_error: The squared Frobenius norm of W - B A, in W's units.
        singular_values: All of W's, descending, float64.
    """

    down: Tensor
    up: Tensor
    squared_error: float
    singular_values: Tensor

    @property
    def rank(self) -> int:
        """The inner dimension k."""
        return self.down.shape[0]


def singular_values(W: Tensor) -> Tensor:
    """Return the singular values of W (out, in), descending, in float64, from the smaller Gram matrix."""
    tall = W if W.shape[0] >= W.shape[1] else W.T
    return eigenvalues(gram_matrix(tall)).flip(0).clamp_min(0).sqrt()


@dataclass(frozen=True)
class Subspace:
    """The k leading right singular directions of W (out, in).

    Args:
        basis: V_k (in, k), orthonormal columns ordered by falling singular value.
        singular_values: All of W's, descending, float64.
    """

    basis: Tensor
    singular_values: Tensor


def right_subspace(W: Tensor, rank: int) -> Subspace:
    """Return the leading right singular subspace of W (out, in); the smaller Gram matrix is decomposed."""
    if min(W.shape) > FLOAT64_UP_TO:
        subspace = _gram_subspace(W, rank, torch.float32)
        energy = subspace.singular_values.square()
        if float(energy[rank:].sum()) > FLOAT32_TAIL * float(energy[0]):
            return subspace
    return _gram_subspace(W, rank, torch.float64)


def _gram_subspace(W: Tensor, rank: int, dtype: torch.dtype) -> Subspace:
    tall = W.shape[0] >= W.shape[1]
    values, vectors = leading_eigenvectors(gram_matrix(W if tall else W.T, dtype), rank)
    leading = vectors.flip(1)
    if not tall:
        leading = torch.linalg.qr(product(W.T.to(dtype), leading)).Q
    return Subspace(leading, values.to(torch.float64).flip(0).clamp_min(0).sqrt())


def joint_factors(W: Tensor, rank: int, *, gauge: Gauge = "orthogonal") -> Factors:
    """Return the rank-k factors of the stacked matrix W (out, in).

    In the `orthogonal` gauge A = V_kᵀ has orthonormal rows and B = W V_k; in the `balanced` gauge both
    sides carry the square root of the singular values, which spreads the range for quantization. The
    result has W's dtype; the factorization runs on W's device in float64, or in float32 where that is exact enough.

    Raises:
        ValueError: If rank is not between 1 and min(out, in).
    """
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank {rank} is not between 1 and {min(W.shape)}")
    subspace = right_subspace(W, rank)
    V = subspace.basis
    up = product(W.to(V.dtype), V)
    energy = torch.linalg.vector_norm(up, dim=0, dtype=torch.float64).square()
    total = torch.linalg.vector_norm(W, dtype=torch.float64).square()
    squared_error = max(0.0, float(total - energy.sum()))
    down = V.T
    if gauge == "balanced":
        root = energy.sqrt().clamp_min(torch.finfo(torch.float32).tiny).sqrt().to(V.dtype)
        up, down = up / root, down * root[:, None]
    return Factors(
        down.to(W.dtype).contiguous(), up.to(W.dtype).contiguous(), squared_error, subspace.singular_values
    )


def orthogonality_defect(A: Tensor) -> float:
    """Return the Frobenius norm of AAᵀ - I, zero when the rows of A (k, in) are orthonormal."""
    wide = A.to(torch.float64)
    return float(
        torch.linalg.norm(wide @ wide.T - torch.eye(A.shape[0], dtype=torch.float64, device=A.device))
    )

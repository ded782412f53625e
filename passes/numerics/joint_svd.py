"""Joint rank-k approximation of matrices that read the same input (2402.16319).

Matrices W_i (out_i, in) are stacked on the output axis, W = [W_1; ...; W_n], and W ~ B A with one shared
down-projection A (k, in) and up-projections B_i, the rows of B that belong to W_i.

A full SVD of the stacked matrix is never taken when it is taller than wide: the right singular subspace is
that of the (in, in) Gram matrix, and W projected on it is the best rank-k approximation.

Under a metric the whitened matrix Tᵀ W S is decomposed, with S Sᵀ the second moment of the inputs and T Tᵀ that
of the output gradients (2403.07378).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.options.ranks import Gauge
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.eigen import eigenvalues, gram_matrix, leading_eigenvectors, product
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.threads import one_thread, total

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
        singular_values: All of W's, descending, float64; under a metric those of the whitened target.
        weighted_error: The relative error that was minimized: of the whitened target, or of W without a metric.
    """

    down: Tensor
    up: Tensor
    squared_error: float
    singular_values: Tensor
    weighted_error: float

    @property
    def rank(self) -> int:
        """The inner dimension k."""
        return self.down.shape[0]


def singular_values(W: Tensor) -> Tensor:
    """Return the singular values of W (out, in), descending, in float64, from the smaller Gram matrix."""
    tall = W if W.shape[0] >= W.shape[1] else W.T
    return eigenvalues(gram_matrix(tall)).flip(0).clamp_min(0).sqrt()


def whitened_singular_values(
    W: Tensor, inputs: Metric | None = None, outputs: Metric | None = None, cross: Tensor | None = None
) -> Tensor:
    """Return the singular values of what `joint_factors` decomposes, descending, in float64.

    The squares beyond rank k sum to the squared weighted error of the rank-k factors.
    """
    return singular_values(_whitened(_target(W, inputs, cross), outputs))


def _target(W: Tensor, inputs: Metric | None, cross: Tensor | None) -> Tensor:
    if inputs is None:
        if cross is not None:
            raise ValueError("a cross moment needs the second moment of the inputs")
        return W
    return inputs.target(W, cross)


def _whitened(target: Tensor, outputs: Metric | None) -> Tensor:
    return target if outputs is None else outputs.rows(target)


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


@one_thread()
def _gram_subspace(W: Tensor, rank: int, dtype: torch.dtype) -> Subspace:
    tall = W.shape[0] >= W.shape[1]
    values, vectors = leading_eigenvectors(gram_matrix(W if tall else W.T, dtype), rank)
    leading = vectors.flip(1)
    if not tall:
        leading = torch.linalg.qr(product(W.T.to(dtype), leading)).Q
    return Subspace(leading, values.to(torch.float64).flip(0).clamp_min(0).sqrt())


def factors_under(
    W: Tensor, rank: int, curvature: Curvature | None, *, gauge: Gauge = "orthogonal"
) -> Factors:
    """Return `joint_factors` under a curvature; None weighs all inputs and outputs alike."""
    if curvature is None:
        return joint_factors(W, rank, gauge=gauge)
    inputs, outputs = curvature.inputs.metric, curvature.output_metric
    return joint_factors(W, rank, gauge=gauge, inputs=inputs, outputs=outputs, cross=curvature.inputs.cross)


def joint_factors(
    W: Tensor,
    rank: int,
    *,
    gauge: Gauge = "orthogonal",
    inputs: Metric | None = None,
    outputs: Metric | None = None,
    cross: Tensor | None = None,
) -> Factors:
    """Return the rank-k factors of the stacked matrix W (out, in) that minimize |Tᵀ (W - B A) S|.

    In the `orthogonal` gauge A = V_kᵀ S^-1, so A S has orthonormal rows (A itself without a metric) and
    A x has uncorrelated coordinates of mean square one, but for the damping; B carries the singular values.
    In the `balanced` gauge each direction has the same norm on both sides, which spreads the range for
    quantization. The result has W's dtype; the factorization runs on W's device in float64, or in float32
    where that is exact enough.

    Args:
        W: The stacked matrix.
        rank: k.
        gauge: Which factor carries the singular values.
        inputs: Metric of the inputs (in).
        outputs: Metric of the output gradients (out), a block for each member.
        cross: E[x₀ xᵀ] (in, in); instead of W the map of x that comes closest to W x₀ is factorized.

    Raises:
        ValueError: If rank is not between 1 and min(out, in), or a cross moment comes without `inputs`.
    """
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank {rank} is not between 1 and {min(W.shape)}")
    target = _target(W, inputs, cross)
    subspace = right_subspace(_whitened(target, outputs), rank)
    V = subspace.basis
    # Whatever the metric of the outputs, this B is the best for the chosen subspace.
    up = product(target.to(V.dtype), V)
    down = V.T if inputs is None else inputs.unweighted(V.T).to(V.dtype)
    if inputs is None:
        energy = torch.linalg.vector_norm(up, dim=0, dtype=torch.float64).square()
        whole = torch.linalg.vector_norm(W, dtype=torch.float64).square()
        squared_error = max(0.0, float(whole - energy.sum()))
    else:
        squared_error = float(total((W.to(V.dtype) - product(up, down)).double().square()))
    up, down = _balanced(up, down) if gauge == "balanced" else (up, down)
    return Factors(
        down.to(W.dtype).contiguous(),
        up.to(W.dtype).contiguous(),
        squared_error,
        subspace.singular_values,
        _tail(subspace.singular_values, rank),
    )


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors with columns of B and rows of A of equal norms."""
    tiny = torch.finfo(torch.float32).tiny
    scale = (up.norm(dim=0).clamp_min(tiny) / down.norm(dim=1).clamp_min(tiny)).sqrt()
    return up / scale, down * scale[:, None]


def _tail(values: Tensor, rank: int) -> float:
    """Return the share of the norm that lies beyond a rank."""
    energy = values.square()
    total = float(energy.sum())
    return (float(energy[rank:].sum()) / total) ** 0.5 if total else 0.0


def orthogonality_defect(A: Tensor, inputs: Metric | None = None) -> float:
    """Return the Frobenius norm of AAᵀ - I, zero when the rows of A (k, in) are orthonormal; under a metric of A S."""
    wide = (A if inputs is None else inputs.columns(A)).to(torch.float64)
    return float(
        torch.linalg.norm(wide @ wide.T - torch.eye(A.shape[0], dtype=torch.float64, device=A.device))
    )

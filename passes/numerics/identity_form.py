"""The identity form of a factor pair: k rows of W ~ B A as they are, the other rows as combinations of them.

With P the pivot rows, z = B_P A x = D x are k of the outputs themselves, and the others are C z with
C = B_rest B_P^-1: the k² entries of the gauge freedom are not stored, so k (in + out - k) parameters are always
fewer than those of the dense matrix (2501.19090).

The outputs come out in another order, pivots first. Where the rows are neurons of an MLP the neurons can be
renumbered instead (`paired` keeps gate and up of a neuron together); everywhere else the order is restored by a
Gather.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.joint_svd import singular_values
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.pivoting import exchange, greedy_groups, pivoted_rows
from rk_export.passes.numerics.threads import one_thread

COEFFICIENT_BOUND = 2.0
# A pivot block beyond this condition is treated as rank-deficient.
LARGEST_CONDITION = 1e10
# Share of the Gram matrix' mean diagonal added before it is inverted: quantized rows may be zero.
RIDGE = 1e-9


@dataclass(frozen=True)
class IdentityForm:
    """W[pivots] ~ down, W[others] ~ coefficients @ down.

    Args:
        down: D (k, in), the pivot rows.
        coefficients: C (out - k, k).
        pivots: Indices of the pivot rows, int64 (k,).
        others: Indices of the other rows, int64 (out - k,).
        condition: Condition number of the pivot rows B_P in B's gauge: in the orthogonal gauge that of D under
            the metric; infinite if they are dependent.
    """

    down: Tensor
    coefficients: Tensor
    pivots: Tensor
    others: Tensor
    condition: float

    @property
    def max_coefficient(self) -> float:
        """The largest coefficient's absolute value."""
        return float(self.coefficients.abs().max())

    @property
    def order(self) -> Tensor:
        """Where each row of W stands in [down; coefficients @ down], int64 (out,)."""
        return torch.cat([self.pivots, self.others]).argsort()


def identity_form(
    up: Tensor, down: Tensor, *, paired: bool = False, bound: float = COEFFICIENT_BOUND
) -> IdentityForm:
    """Return the identity form of B A.

    Args:
        up: B (out, k), k below out; the orthogonal gauge makes `condition` meaningful.
        down: A (k, in).
        paired: Take row j of the upper half and of the lower half together: the pivots are then the same
            neurons of gate and of up, half of k each.
        bound: An exchange of pivots must enlarge their volume by more than this; no coefficient exceeds it,
            unless `paired`, where the bound is on the pairs' determinants.

    Raises:
        ValueError: If k is not below out, or is odd though `paired`.
    """
    out, rank = up.shape
    if not 1 <= rank < out or (paired and (rank % 2 or out % 2)):
        raise ValueError(f"rank {rank} has no identity form of {out} {'paired ' if paired else ''}rows")
    B = up.to(torch.float64)
    pivots, others = _pivot_rows(B, 2 if paired else 1, bound)
    values = singular_values(B[pivots])
    condition = float(values[0] / values[-1]) if float(values[-1]) > 0 else math.inf
    return IdentityForm(
        down=product(B[pivots], down.to(torch.float64)).to(up.dtype),
        coefficients=_coefficients(B[others], B[pivots], condition).to(up.dtype),
        pivots=pivots,
        others=others,
        condition=condition,
    )


@one_thread()
def _pivot_rows(B: Tensor, size: int, bound: float) -> tuple[Tensor, Tensor]:
    """Return the indices of the pivots and of the other rows, each group's first rows before the second ones."""
    out, rank = B.shape
    grouped = B.view(size, out // size, rank).transpose(0, 1)
    chosen = pivoted_rows(B) if size == 1 else greedy_groups(grouped)
    mask = torch.ones(len(grouped), dtype=torch.bool, device=B.device)
    mask[chosen] = False
    left = mask.nonzero().flatten()
    pivot_block = grouped[chosen].flatten(0, 1)
    C, singular = torch.linalg.solve_ex(pivot_block, grouped[left].flatten(0, 1), left=False)
    if not int(singular) and bool(torch.isfinite(C).all()):
        for other, pivot in exchange(C.contiguous(), size, bound):
            entering = left[other].clone()
            left[other] = chosen[pivot]
            chosen[pivot] = entering
    chosen, left = chosen.sort().values, left.sort().values
    steps = torch.arange(size, device=B.device)[:, None] * (out // size)
    return (chosen + steps).flatten(), (left + steps).flatten()


@one_thread()
def _coefficients(rest: Tensor, pivot_block: Tensor, condition: float) -> Tensor:
    """Return C with C B_P = B_rest; the smallest such C where the pivots are dependent."""
    if condition > LARGEST_CONDITION:
        return product(rest, torch.linalg.pinv(pivot_block, rtol=1 / LARGEST_CONDITION))
    solved: Tensor = torch.linalg.solve(pivot_block, rest, left=False)
    return solved


@one_thread()
def refit_up(W: Tensor, down: Tensor, inputs: Metric | None = None, cross: Tensor | None = None) -> Tensor:
    """Return the B (out, k) that minimizes |(W - B A) S| for a given A, usually a quantized one.

    B = W* C Aᵀ (A C Aᵀ)^-1, with W* the corrected target of `Metric.target` where a cross moment is given.

    Args:
        W: (out, in).
        down: A (k, in).
        inputs: Metric of the inputs; None weighs them alike.
        cross: E[x₀ xᵀ] (in, in).
    """
    target = W.to(torch.float64) if inputs is None else inputs.target(W, cross).to(torch.float64)
    weighted = (down if inputs is None else inputs.columns(down)).to(torch.float64)
    gram = product(weighted, weighted.mT)
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) or 1.0)
    factor = torch.linalg.cholesky(gram)
    B: Tensor = torch.cholesky_solve(product(weighted, target.mT), factor).mT
    return B.to(W.dtype).contiguous()

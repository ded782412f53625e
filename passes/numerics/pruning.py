"""Structured pruning under second moments: which columns go, and what makes up for them.

A matrix W (out, in) reads x with second moment H = E[x xᵀ]. Dropping inputs P and refitting the columns S
that stay costs at least tr(W_P (H⁻¹_PP)⁻¹ W_Pᵀ), so the inverse ranks the candidates and least squares does
the rest (Optimal Brain Surgeon for structures: ZipLM 2302.04089; MoDeGPT 2408.09632 refits by Nyström).
Everything runs in float64 on the device of the tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.threads import one_thread, total

# Added to each diagonal entry of a second moment, as a share of it: the largest inputs of a layer can be a
# thousand times the median, so a share of the mean would drown the others. On SmolLM2-135M (12,288 calibration
# tokens, errors on 2,048 tokens of another text) 0.1 served best for output projections.
DAMPING = 0.1
# Between two rankings, at most this share of the columns still to go is dropped.
SHARE_PER_ROUND = 1 / 4


def damped(H: Tensor, damping: float = DAMPING) -> Tensor:
    """Return H (n, n) in float64 with every diagonal entry larger by `damping` of itself."""
    wide = H.to(torch.float64)
    diagonal = wide.diagonal()
    # Inputs that are never active would leave it singular.
    floor = 1e-12 * diagonal.mean().clamp_min(torch.finfo(torch.float32).tiny)
    return wide + torch.diag((damping * diagonal).clamp_min(floor))


@dataclass(frozen=True)
class Reduction:
    """Second moments of a matrix's input x and of the shorter input z that takes its place.

    Args:
        full: E[x xᵀ] (in, in).
        cross: E[x zᵀ] (in, r).
        reduced: E[z zᵀ] (r, r).
    """

    full: Tensor
    cross: Tensor
    reduced: Tensor

    @classmethod
    def of_columns(cls, H: Tensor, kept: Tensor) -> Reduction:
        """Return the reduction of x to some of its entries."""
        return cls(H, H[:, kept], H[kept][:, kept])

    @classmethod
    def of_map(cls, H: Tensor, L: Tensor) -> Reduction:
        """Return the reduction of x to L x, L (r, in)."""
        wide = H.to(L.dtype)
        cross = wide @ L.T
        return cls(wide, cross, L @ cross)

    def error(self, W: Tensor, reduced: Tensor) -> float:
        """Return the relative error of `reduced` z (out, r) as W x, W (out, in)."""
        wide, short = W.to(torch.float64), reduced.to(torch.float64)
        total = _energy(wide, self.full, wide)
        rest = total - 2 * _energy(wide, self.cross, short) + _energy(short, self.reduced, short)
        return math.sqrt(max(0.0, rest) / total) if total else 0.0


def _energy(A: Tensor, M: Tensor, B: Tensor) -> float:
    """Return tr(A M Bᵀ)."""
    return float(total((A @ M.to(torch.float64)) * B))


@one_thread()
def refit(W: Tensor, start: Tensor, inputs: Reduction, damping: float = DAMPING) -> Tensor:
    """Return the matrix (out, r) near `start` that reproduces W x from z in least squares.

    Args:
        W: The matrix (out, in).
        start: (out, r), the reduced matrix before the correction; the damping pulls towards it.
        inputs: Second moments of x and z.
        damping: As in `damped`.

    Returns:
        start + (W E[x zᵀ] - start E[z zᵀ]) damped(E[z zᵀ])⁻¹, in W's dtype.
    """
    wide = start.to(torch.float64)
    residual = W.to(torch.float64) @ inputs.cross.to(torch.float64)
    residual -= wide @ inputs.reduced.to(torch.float64)
    correction: Tensor = torch.linalg.solve(damped(inputs.reduced, damping), residual.T).T
    return (wide + correction).to(W.dtype)


@one_thread()
def eliminate_columns(W: Tensor, H: Tensor, count: int, damping: float = DAMPING) -> Tensor:
    """Return the ascending indices of the `count` columns of W (out, in) that stay under H (in, in).

    Backward elimination: the columns with the smallest ‖w_j‖² / H⁻¹_jj go, their share is spread over the
    others, and the ranking is made anew (2302.04089).

    Raises:
        ValueError: If count is not between 1 and the number of columns.
    """
    columns = W.shape[1]
    if not 1 <= count <= columns:
        raise ValueError(f"{count} columns of {columns}")
    left = torch.arange(columns, device=W.device)
    weight, inverse = W.to(torch.float64), torch.linalg.inv(damped(H, damping))
    while len(left) > count:
        excess = len(left) - count
        step = max(1, int(excess * SHARE_PER_ROUND))
        scores = weight.square().sum(0) / inverse.diagonal()
        gone = scores.argsort()[:step]
        stay = torch.ones(len(left), dtype=torch.bool, device=W.device)
        stay[gone] = False
        spread = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, stay])
        weight = weight[:, stay] - weight[:, gone] @ spread
        inverse = inverse[stay][:, stay] - inverse[stay][:, gone] @ spread
        left = left[stay]
    return left


def largest(scores: Tensor, count: int) -> Tensor:
    """Return the ascending indices of the `count` largest scores (n,)."""
    kept: Tensor = scores.topk(count).indices.sort().values
    return kept


def neuron_norms(readers: Sequence[Tensor], down: Tensor) -> Tensor:
    """Return a data-free score of each FFN neuron: the product of the norms of its rows and of its column.

    Args:
        readers: The up-projection (width, in), and the gate's where there is one.
        down: (out, width).
    """
    scores: Tensor = down.to(torch.float64).norm(dim=0)
    for rows in readers:
        scores = scores * rows.to(torch.float64).norm(dim=1)
    return scores


@one_thread()
def block_costs(W: Tensor, H: Tensor, blocks: int, damping: float = DAMPING) -> Tensor:
    """Return what dropping each of `blocks` equal column blocks of W (out, in) costs after the refit.

    Returns:
        (blocks,), tr(W_P (H⁻¹_PP)⁻¹ W_Pᵀ): squared output error, a mean over tokens.
    """
    inverse = torch.linalg.inv(damped(H, damping))
    parts = torch.arange(W.shape[1], device=W.device).view(blocks, -1)
    costs = []
    for part in parts:
        columns = W[:, part].to(torch.float64)
        costs.append((columns * torch.linalg.solve(inverse[part][:, part], columns.T).T).sum())
    return torch.stack(costs)

"""Low rank beside sparse entries under the curvature of the loss: what a mixture costs, and how it is fitted.

With the entries S set aside, the best rank-k part of W - S and the loss that it leaves come from the singular
values of the whitened matrix, for all k at once (2403.07378). The entries are those of largest e² G_ii C_jj, what
each would cost alone. Fitting alternates: entries of the largest error beside the low rank, low rank beside the
entries (as 2409.13652 does under a diagonal metric), and ends with the low rank, whose fit is exact.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.joint_svd import joint_factors, whitened_singular_values
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, empty_factors, index_dtype
from rk_export.passes.numerics.metric import Metric


@dataclass(frozen=True)
class TwoSides:
    """The curvature of a matrix (out, in), as metrics; an error E costs ½ |Tᵀ E S|².

    Args:
        inputs: S Sᵀ, the second moment of the inputs.
        outputs: T Tᵀ, that of the output gradients, in a scale that gives nats per token.
    """

    inputs: Metric
    outputs: Metric

    def loss(self, E: Tensor) -> float:
        """Return the predicted loss of an error E (out, in)."""
        return 0.5 * float(self.outputs.rows(self.inputs.columns(E)).square().sum(dtype=torch.float64))

    def weights(self) -> Tensor:
        """Return what a squared error in each place costs alone, G_ii C_jj (out, in), float32."""
        return (_diagonal(self.outputs)[:, None] * _diagonal(self.inputs)[None]).to(torch.float32)


def _diagonal(metric: Metric) -> Tensor:
    squares = [root.square() if root.ndim == 1 else root.square().sum(1) for root in metric.roots]
    return torch.cat([part.to(torch.float64) for part in squares])


def mixture_losses(W: Tensor, sides: TwoSides, entries: Sequence[int]) -> Tensor:
    """Return the predicted loss with each number of entries and every rank (counts, min(out, in) + 1), float64.

    Args:
        W: (out, in).
        sides: The curvature of W.
        entries: How many entries are set aside, at most out · in.
    """
    scores = W.square() * sides.weights()
    rows = []
    for count in entries:
        left = torch.where(largest(scores, count), 0.0, W)
        energy = whitened_singular_values(left, sides.inputs, sides.outputs).square()
        tails = energy.flip(0).cumsum(0).flip(0)
        rows.append(0.5 * torch.cat([tails, tails.new_zeros(1)]))
    return torch.stack(rows)


def fitted_mixture(W: Tensor, sides: TwoSides, rank: int, entries: int, rounds: int = 4) -> Parts:
    """Return W (out, in) as a factor pair of a rank and a number of entries, fitted by alternation; on the CPU.

    Args:
        W: float32.
        sides: The curvature of W.
        rank: From 0 to min(out, in).
        entries: From 0 to out · in.
        rounds: How often entries are chosen anew beside the low rank; the best round counts.
    """
    weights = sides.weights()
    mask = largest(W.square() * weights, entries)
    sparse = torch.where(mask, W, 0.0)
    if rank == 0:
        return _parts(*empty_factors((W.shape[0], W.shape[1]), W), sparse, mask)
    best = _beside(W, sides, rank, sparse, mask)
    newest = best
    for _ in range(rounds if entries else 0):
        error = W - newest.up @ newest.down
        mask = largest(error.square() * weights, entries)
        newest = _beside(W, sides, rank, torch.where(mask, error, 0.0), mask)
        best = min(best, newest, key=lambda fit: fit.loss)
    return _parts(best.up, best.down, best.sparse, best.mask)


@dataclass(frozen=True)
class _Fit:
    """A low-rank part beside entries, and the loss that both leave."""

    up: Tensor
    down: Tensor
    sparse: Tensor
    mask: Tensor
    loss: float


def _beside(W: Tensor, sides: TwoSides, rank: int, sparse: Tensor, mask: Tensor) -> _Fit:
    left = W - sparse
    factors = joint_factors(left, rank, gauge="balanced", inputs=sides.inputs, outputs=sides.outputs)
    return _Fit(factors.up, factors.down, sparse, mask, sides.loss(left - factors.up @ factors.down))


def refitted(W: Tensor, sides: TwoSides, parts: Parts) -> Parts:
    """Return parts of W (out, in) with the best low-rank part of their rank beside their entries; on the CPU."""
    rank = min(parts.rank, *parts.shape)
    if rank == 0:
        return parts
    left = W - parts.sparse().to(W.device)
    factors = joint_factors(left, rank, gauge="balanced", inputs=sides.inputs, outputs=sides.outputs)
    return Parts(factors.up.cpu(), factors.down.cpu(), parts.indices, parts.values)


def largest(scores: Tensor, count: int) -> Tensor:
    """Return which entries of a matrix have the largest scores, bool like `scores`: exactly `count` of them."""
    flat = scores.flatten()
    mask = torch.zeros_like(flat, dtype=torch.bool)
    if count >= len(flat):
        mask.fill_(True)
    elif count > 0:
        limit = flat.kthvalue(len(flat) - count + 1).values
        torch.gt(flat, limit, out=mask)
        ties = (flat == limit).nonzero()[:, 0]
        mask[ties[: count - int(mask.sum())]] = True
    return mask.view_as(scores)


def _parts(up: Tensor, down: Tensor, sparse: Tensor, mask: Tensor) -> Parts:
    indices = mask.flatten().nonzero()[:, 0]
    values = sparse.flatten()[indices]
    dtype = index_dtype((sparse.shape[0], sparse.shape[1]))
    return Parts(up.cpu(), down.cpu(), indices.to(dtype).cpu(), values.cpu())

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

from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.joint_svd import factors_under, whitened_singular_values
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, index_dtype, rank_zero_factors
from rk_export.passes.numerics.metric import Metric


def entry_weights(curvature: Curvature) -> Tensor:
    """Return what a squared error in each place costs alone, G_ii C_jj of the damped metrics (out, in), float32."""
    rows, columns = _diagonal(curvature.output_metric), _diagonal(curvature.inputs.metric)
    return (rows[:, None] * columns[None]).to(torch.float32)


def _diagonal(metric: Metric | None) -> Tensor:
    if metric is None:
        raise ValueError("no gradients were taken")
    squares = [root.square() if root.ndim == 1 else root.square().sum(1) for root in metric.roots]
    return torch.cat([part.to(torch.float64) for part in squares])


def part_losses(parts: Parts, curvature: Curvature) -> Tensor:
    """Return what leaving out each part alone costs (parts,): each direction of the low rank, then each entry.

    Args:
        parts: Of one matrix.
        curvature: Of that matrix.
    """
    up, down = parts.up, parts.down
    (G,), C = curvature.outputs.values(), curvature.inputs.second
    weighed = G[:, None] * up if G.ndim == 1 else product(G, up)
    directions = (weighed * up).sum(0) * (product(down, C) * down).sum(1)
    rows = (G if G.ndim == 1 else G.diagonal())[parts.indices.long() // parts.shape[1]]
    columns = C.diagonal()[parts.indices.long() % parts.shape[1]]
    return 0.5 * curvature.scale * torch.cat([directions, parts.values.square() * rows * columns])


def mixture_losses(W: Tensor, curvature: Curvature, entries: Sequence[int]) -> Tensor:
    """Return the predicted loss with each number of entries and every rank (counts, min(out, in) + 1), float64.

    Args:
        W: (out, in).
        curvature: Of W.
        entries: How many entries are set aside, at most out · in.
    """
    scores = W.square() * entry_weights(curvature)
    rows = []
    for count in entries:
        left = torch.where(largest(scores, count), 0.0, W)
        energy = whitened_singular_values(left, curvature.inputs.metric, curvature.output_metric).square()
        tails = energy.flip(0).cumsum(0).flip(0)
        rows.append(0.5 * torch.cat([tails, tails.new_zeros(1)]))
    return torch.stack(rows)


def fitted_mixture(W: Tensor, curvature: Curvature, rank: int, entries: int, rounds: int = 4) -> Parts:
    """Return W (out, in) as a factor pair of a rank and a number of entries, fitted by alternation; on the CPU.

    Args:
        W: float32.
        curvature: Of W.
        rank: From 0 to min(out, in).
        entries: From 0 to out · in.
        rounds: How often entries are chosen anew beside the low rank; the best round counts.
    """
    weights = entry_weights(curvature)
    mask = largest(W.square() * weights, entries)
    sparse = torch.where(mask, W, 0.0)
    if rank == 0:
        return _parts(*rank_zero_factors((W.shape[0], W.shape[1]), W), sparse, mask)
    best = _beside(W, curvature, rank, sparse, mask)
    newest = best
    for _ in range(rounds if entries else 0):
        error = W - newest.up @ newest.down
        mask = largest(error.square() * weights, entries)
        newest = _beside(W, curvature, rank, torch.where(mask, error, 0.0), mask)
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


def _beside(W: Tensor, curvature: Curvature, rank: int, sparse: Tensor, mask: Tensor) -> _Fit:
    left = W - sparse
    factors = factors_under(left, rank, curvature, gauge="balanced")
    return _Fit(factors.up, factors.down, sparse, mask, curvature.loss(left - factors.up @ factors.down))


def refitted(W: Tensor, curvature: Curvature, parts: Parts) -> Parts:
    """Return parts of W (out, in) with the best low-rank part of their rank beside their entries; on the CPU."""
    rank = min(parts.rank, *parts.shape)
    if rank == 0:
        return parts
    left = W - parts.sparse().to(W.device)
    factors = factors_under(left, rank, curvature, gauge="balanced")
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

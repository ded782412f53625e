"""Sparse and low rank together under the inputs (SSLC, 2510.26446), with the kept entries refitted.

Minimize the error tr((W - U V - S) C (W - U V - S)ᵀ) on inputs of second moment C, with the rank of U V and the number
of S' entries given. The two parts alternate: S keeps the entries of W - U V of largest |e_ij| √C_jj (Wanda's score,
2306.11695), then U V is fitted to what S leaves. Beyond the paper the entries do not stay what they were in W - U V:
their values solve the normal equations ((W - U V - S) C)_ij = 0 on S' places, which is what makes up for the entries
that went. The first low-rank part is the whitened singular value decomposition (2403.07378); later ones are one step
of alternating least squares from the last, a block power iteration, which cannot raise the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.joint_svd import joint_factors
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, empty_factors, index_dtype
from rk_export.passes.numerics.metric import Metric

ROUNDS = 8
# Steps of conjugate gradients that refit the entries in a round, and after the last one.
STEPS, LAST_STEPS = 6, 20
_TINY = 1e-30


def squared_error(E: Tensor, C: Tensor) -> float:
    """Return tr(E C Eᵀ), the mean of |E x|² over inputs, of an error E (out, in) under C (in, in)."""
    return float((product(E, C) * E).sum(dtype=torch.float64))


def largest_in_rows(scores: Tensor, count: int) -> Tensor:
    """Return which entries to keep, bool like `scores` (out, in): exactly `count`, the same number in every row.

    What `count` leaves over after whole rows goes to the entries of largest score that come next in their row.

    Raises:
        ValueError: If the matrix has not so many entries.
    """
    rows, columns = scores.shape
    if not 0 <= count <= rows * columns:
        raise ValueError(f"{count} entries of a {rows} x {columns} matrix")
    whole, rest = divmod(count, rows)
    order = scores.topk(min(whole + 1, columns), dim=1)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(1, order.indices[:, :whole], True)
    if rest:
        lucky = order.values[:, whole].topk(rest).indices
        mask[lucky, order.indices[lucky, whole]] = True
    return mask


def refit_entries(R: Tensor, C: Tensor, mask: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return the S on `mask` that comes closest to R under C, by conjugate gradients from `start`.

    Every row is a least-squares problem of its own, (S C)_ij = (R C)_ij on the row's places; all run together,
    preconditioned by C's diagonal. No step raises the error of any row.

    Args:
        R: What S stands for (out, in), float32.
        C: Second moment of the inputs (in, in), positive definite, float32.
        mask: Places of the entries, bool (out, in).
        start: (out, in), zero off the mask.
        steps: Of conjugate gradients.
    """
    scale = C.diagonal()
    S = start.clone()
    residual = product(R - S, C) * mask
    conditioned = residual / scale
    direction, power = conditioned.clone(), _by_row(residual, conditioned)
    for _ in range(steps):
        pushed = product(direction, C) * mask
        length = power / _by_row(direction, pushed).clamp_min(_TINY)
        S += length * direction
        residual -= length * pushed
        conditioned = residual / scale
        before, power = power, _by_row(residual, conditioned)
        direction = conditioned + (power / before.clamp_min(_TINY)) * direction
    return S


def _by_row(A: Tensor, B: Tensor) -> Tensor:
    return (A * B).sum(1, keepdim=True)


def best_low_rank(R: Tensor, C: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return U (out, rank), V (rank, in) with the least error of R - U V under C: the whitened truncated SVD.

    Args:
        R: (out, in), float32.
        C: Positive definite (in, in).
        rank: From 1 to min(out, in).

    Raises:
        ValueError: If C is not positive definite.
    """
    root, failed = torch.linalg.cholesky_ex(C.to(torch.float64))
    if int(failed):
        raise ValueError("the second moment is not positive definite")
    factors = joint_factors(R, rank, gauge="balanced", inputs=Metric((root,), (0.0,)))
    return factors.up, factors.down


def improved_low_rank(R: Tensor, C: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of R, no worse under C than the best U beside a given V: least squares for U, V, and U again.

    Args:
        R: (out, in), float32.
        C: Positive definite (in, in), float32.
        down: V (rank, in) to start from.
    """
    up = _best_up(R, C, down)
    # With all columns of the inputs free the metric cancels: V = U⁺ R.
    down = torch.linalg.lstsq(up.to(torch.float64), R.to(torch.float64)).solution.to(R.dtype)
    return _best_up(R, C, down), down


def _best_up(R: Tensor, C: Tensor, down: Tensor) -> Tensor:
    """Return the U (out, rank) of least error beside V (rank, in): U V C Vᵀ = R C Vᵀ."""
    weighed = product(down, C)
    gram = product(weighed, down.T).to(torch.float64)
    solved: Tensor = torch.linalg.lstsq(gram, product(R, weighed.T).T.to(torch.float64)).solution
    return solved.T.to(R.dtype)


@dataclass(frozen=True)
class Fit:
    """A low-rank part and entries beside it.

    Args:
        up: U (out, rank).
        down: V (rank, in).
        sparse: S (out, in), zero off the mask.
        mask: Places of S' entries, bool (out, in).
        errors: The error under C after every round, as it was minimized; the last is this fit's.
    """

    up: Tensor
    down: Tensor
    sparse: Tensor
    mask: Tensor
    errors: tuple[float, ...]

    def dense(self) -> Tensor:
        """Return U V + S (out, in)."""
        return product(self.up, self.down) + self.sparse

    def parts(self) -> Parts:
        """Return the fit as it is stored; on the CPU."""
        indices = self.mask.flatten().nonzero()[:, 0]
        dtype = index_dtype((self.mask.shape[0], self.mask.shape[1]))
        values = self.sparse.flatten()[indices]
        return Parts(self.up.cpu(), self.down.cpu(), indices.to(dtype).cpu(), values.cpu())


def alternate(W: Tensor, C: Tensor, rank: int, entries: int, rounds: int = ROUNDS) -> Fit:
    """Return W (out, in) as a factor pair of a rank and a number of entries, fitted to each other under C.

    Args:
        W: float32.
        C: Second moment of the inputs (in, in), damped so far that it is positive definite, float32.
        rank: From 0 to min(out, in).
        entries: From 0 to out · in.
        rounds: How often the entries are chosen anew beside the low rank. A round that does not lower the error is
            the last; without a low-rank part the first choice stands.
    """
    weights = C.diagonal()
    mask = largest_in_rows(W.square() * weights, entries)
    up, down = empty_factors((W.shape[0], W.shape[1]), W)
    sparse = W * mask
    if rank:
        up, down = best_low_rank(W - sparse, C, rank)
    best = Fit(up, down, sparse, mask, (squared_error(W - product(up, down) - sparse, C),))
    for _ in range(rounds if rank and entries else 0):
        newest = _round(W, C, best)
        if newest.errors[-1] >= best.errors[-1]:
            break
        best = newest
    return _finished(W, C, best)


def _round(W: Tensor, C: Tensor, fit: Fit) -> Fit:
    """Choose the entries anew beside the low rank, refit them, and fit the low rank to what they leave."""
    left = W - product(fit.up, fit.down)
    mask = largest_in_rows(left.square() * C.diagonal(), int(fit.mask.sum()))
    start = torch.where(fit.mask, fit.sparse, left) * mask
    sparse = refit_entries(left, C, mask, start, STEPS)
    up, down = improved_low_rank(W - sparse, C, fit.down)
    error = squared_error(W - product(up, down) - sparse, C)
    return Fit(up, down, sparse, mask, (*fit.errors, error))


def _finished(W: Tensor, C: Tensor, fit: Fit) -> Fit:
    left = W - product(fit.up, fit.down)
    sparse = refit_entries(left, C, fit.mask, fit.sparse, LAST_STEPS)
    return Fit(fit.up, fit.down, sparse, fit.mask, (*fit.errors, squared_error(left - sparse, C)))

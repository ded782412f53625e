"""Sparse and low rank together under the inputs (SSLC, 2510.26446), with the kept entries refitted.

Minimize the error tr((W - U V - S) C (W - U V - S)ᵀ) on inputs of second moment C, with the rank of U V and the number
of S' entries given. Both parts are fitted in turn, S to W - U V and U V to W - S: the first time by the whitened
singular value decomposition (2403.07378), then by a step of alternating least squares from the last, a block power
iteration, which cannot raise the error.

Beyond the paper: kept entries do not stay what they were. Their values solve the normal equations
((W - U V - S) C)_ij = 0 on S' places, which makes up for the entries that went. Entries go in stages, at each those
that would then cost least, s_ij² / (C⁻¹)_jj with the others free to make up for them (Optimal Brain Surgeon);
the paper's score |w_ij| √C_jj, Wanda's (2306.11695), is what they cost alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.joint_svd import joint_factors
from rk_export.passes.numerics.low_rank_plus_sparse import Parts, index_dtype, rank_zero_factors
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.mixed import largest
from rk_export.passes.numerics.threads import one_thread, total

# Steps of conjugate gradients that refit the entries: at a stage, and at the end.
STEPS, LAST_STEPS = 6, 12
# Rounds of both parts in turn once all entries that go are gone.
ROUNDS = 3
_TINY = 1e-30


def squared_error(E: Tensor, C: Tensor) -> float:
    """Return tr(E C Eᵀ), the mean of |E x|² over inputs, of an error E (out, in) under C (in, in)."""
    return float(total(product(E, C) * E))


@one_thread()
def column_costs(C: Tensor) -> Tensor:
    """Return what a unit of squared error costs in each column once all others make up for it: 1 / (C⁻¹)_jj.

    Args:
        C: Positive definite (in, in).

    Returns:
        (in,), of C's dtype; the variance of an input that the others do not explain.

    Raises:
        ValueError: If C is not positive definite.
    """
    root = _root(C)
    inverse = torch.cholesky_inverse(root)
    return (1 / inverse.diagonal()).to(C.dtype)


@one_thread()
def _root(C: Tensor) -> Tensor:
    root, failed = torch.linalg.cholesky_ex(C.to(torch.float64))
    if int(failed):
        raise ValueError("the second moment is not positive definite")
    lower: Tensor = root
    return lower


def refit_entries(R: Tensor, C: Tensor, mask: Tensor, start: Tensor, steps: int) -> Tensor:
    """Return the S on `mask` that comes closest to R under C, by conjugate gradients from `start`.

    Every row is a least-squares problem of its own, (S C)_ij = (R C)_ij on the row's places; all run together,
    preconditioned by C's diagonal. No step raises the error of any row.

    Args:
        R: What S stands for (out, in), float32.
        C: Second moment of the inputs (in, in), positive definite, float32.
        mask: Places of the entries, bool (out, in).
        start: (out, in); only what is on the mask counts.
        steps: Of conjugate gradients.
    """
    scale = C.diagonal()
    S = start * mask
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
    factors = joint_factors(R, rank, gauge="balanced", inputs=Metric((_root(C),), (0.0,)))
    return factors.up, factors.down


@one_thread()
def improved_low_rank(R: Tensor, C: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Return factors of R, no worse under C than the best U beside a given V: least squares for U, V, and U again.

    Args:
        R: (out, in), float32.
        C: Positive definite (in, in), float32.
        down: V (rank, in) to start from.
    """
    up = _best_up(R, C, down)
    # All columns are free, so that the metric cancels: V = U⁺ R.
    down = torch.linalg.lstsq(up.to(torch.float64), R.to(torch.float64)).solution.to(R.dtype)
    return _best_up(R, C, down), down


@one_thread()
def _best_up(R: Tensor, C: Tensor, down: Tensor) -> Tensor:
    """Return the U (out, rank) of least error beside V (rank, in): U V C Vᵀ = R C Vᵀ."""
    weighed = product(down, C)
    gram = product(weighed, down.T.contiguous()).to(torch.float64)
    seen = product(R, weighed.T.contiguous()).to(torch.float64)
    solved: Tensor = torch.linalg.lstsq(gram, seen.T).solution
    return solved.T.to(R.dtype).contiguous()


@dataclass(frozen=True)
class Fit:
    """A low-rank part and entries beside it, W ~ U V + S.

    Args:
        up: U (out, rank).
        down: V (rank, in).
        sparse: S (out, in), zero off the mask.
        mask: Places of S' entries, bool (out, in).
    """

    up: Tensor
    down: Tensor
    sparse: Tensor
    mask: Tensor

    @property
    def low_rank(self) -> Tensor:
        """U V (out, in)."""
        return product(self.up, self.down)

    def dense(self) -> Tensor:
        """Return U V + S (out, in)."""
        return self.low_rank + self.sparse

    def parts(self) -> Parts:
        """Return the fit as it is stored; on the CPU."""
        indices = self.mask.flatten().nonzero()[:, 0]
        dtype = index_dtype((self.mask.shape[0], self.mask.shape[1]))
        values = self.sparse.flatten()[indices]
        return Parts(self.up.cpu(), self.down.cpu(), indices.to(dtype).cpu(), values.cpu())


@dataclass(frozen=True)
class Target:
    """What is approximated, and what errors cost.

    Args:
        W: (out, in), float32.
        C: Second moment of the inputs (in, in), damped so far that it is positive definite, float32.
        rows: What a squared error in each row weighs when entries of different rows are compared (out,), float32.
    """

    W: Tensor
    C: Tensor
    rows: Tensor

    @cached_property
    def columns(self) -> Tensor:
        """What a squared error in each column costs once the others make up for it (in,)."""
        return column_costs(self.C)

    @property
    def costs(self) -> Tensor:
        """What a squared error in each place costs when entries are compared (out, in)."""
        return self.rows[:, None] * self.columns

    def start(self, rank: int, entries: int) -> Fit:
        """Return all entries beside the low-rank part that is best beside the costliest of them alone.

        Args:
            rank: From 0 to min(out, in).
            entries: How many are set aside for that, those that will stay.
        """
        W, everywhere = self.W, torch.ones_like(self.W, dtype=torch.bool)
        if not rank:
            return Fit(*rank_zero_factors((W.shape[0], W.shape[1]), W), W, everywhere)
        aside = W * largest(W.square() * self.costs, entries)
        fit = Fit(*best_low_rank(W - aside, self.C, rank), W, everywhere)
        return replace(fit, sparse=W - fit.low_rank)

    def stages(self, counts: Sequence[int], rank: int = 0) -> Iterator[Fit]:
        """Yield a fit at each number of entries, falling; each starts from the one before.

        Args:
            counts: Entries that stay, falling, each from 0 to out · in.
            rank: Of the low-rank part, from 0 to min(out, in).
        """
        fit = self.start(rank, counts[-1])
        for count in counts:
            scores = (fit.sparse.square() * self.costs).masked_fill(~fit.mask, -1.0)
            fit = self.refitted(replace(fit, mask=largest(scores, count)))
            yield fit

    def refitted(self, fit: Fit, steps: int = STEPS) -> Fit:
        """Return a fit with its entries refitted on their places, then its low-rank part to what they leave.

        The error does not rise where the entries already lie on the mask.
        """
        sparse = refit_entries(self.W - fit.low_rank, self.C, fit.mask, fit.sparse, steps)
        if not len(fit.down):
            return replace(fit, sparse=sparse)
        up, down = improved_low_rank(self.W - sparse, self.C, fit.down)
        return replace(fit, up=up, down=down, sparse=sparse)

    def fitted(self, counts: Sequence[int], rank: int = 0) -> Fit:
        """Return the fit at the last of the numbers of entries, both parts refitted to each other.

        Args:
            counts: As in `stages`, at least one.
            rank: Of the low-rank part.
        """
        *_, fit = self.stages(counts, rank)
        for _ in range(ROUNDS if rank else 0):
            fit = self.refitted(fit)
        left = self.W - fit.low_rank
        return replace(fit, sparse=refit_entries(left, self.C, fit.mask, fit.sparse, LAST_STEPS))


def dropped_losses(E: Tensor, costs: Tensor, counts: Sequence[int]) -> Tensor:
    """Return what is lost where only so many entries of E stay, those that cost most, (counts,), float64.

    Args:
        E: What the entries stand for (out, in).
        costs: Of a unit of squared error in each place (out, in); see `column_costs`.
        counts: Each from 0 to out · in.
    """
    losses = (E.square() * costs).flatten().sort().values.to(torch.float64).cumsum(0)
    dropped = torch.tensor([E.numel() - count for count in counts], device=E.device)
    return torch.cat([losses.new_zeros(1), losses])[dropped].cpu()


def falling_counts(size: int, entries: int, stages: int) -> list[int]:
    """Return how many of `size` entries stay after each of some stages, from most to `entries`.

    Most go early, where they are nearly free: what is left to go falls as a square.
    """
    left = [((stages - stage) / stages) ** 2 for stage in range(1, stages + 1)]
    return [entries + int((size - entries) * share) for share in left]

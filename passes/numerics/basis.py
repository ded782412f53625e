"""Which directions of a matrix a target task needs: schedule, importances and the common rule (2405.15877).

W = U diag(s) V with orthonormal directions. Training re-learns the coefficients s; those that matter least are
dropped, some at each of a number of events. At an event every matrix keeps its most important directions, as few
as hold one common fraction of the importance that it had at the beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.joint_svd import right_subspace
from rk_export.passes.numerics.metric import Metric

DROPPING = 0.75  # share of the steps in which directions are dropped
MEMORY = 0.95  # weight of a step's evidence at the next step, see `second_order`


@dataclass(frozen=True)
class Directions:
    """W = left diag(values) right.

    Args:
        left: U (out, n), columns of norm one, or zero where the value is.
        values: s (n,), falling.
        right: V (n, in), orthonormal rows; under a metric S the rows of V S are.
    """

    left: Tensor
    values: Tensor
    right: Tensor


def directions(W: Tensor, inputs: Metric | None = None) -> Directions:
    """Return all min(out, in) singular directions of W (out, in), or of W S, in W's type; computed in float64.

    Args:
        W: The matrix.
        inputs: S by its metric: so many directions then lose least of W x (2403.07378); None weighs inputs alike.
    """
    weighted = W if inputs is None else inputs.columns(W)
    V = right_subspace(weighted, min(W.shape)).basis
    scaled = product(weighted.to(V.dtype), V)
    values = torch.linalg.vector_norm(scaled, dim=0)
    tiny = torch.finfo(V.dtype).tiny
    left = scaled / values.clamp_min(tiny)
    parts = (left, values, V.T if inputs is None else inputs.unweighted(V.T.contiguous()))
    return Directions(*(part.to(W.dtype).contiguous() for part in parts))


def drop_steps(steps: int, events: int) -> tuple[int, ...]:
    """Return after how many steps directions are dropped: spread evenly over the first three quarters.

    Events that would fall on the same step are one; the last of them falls on the end of the three quarters.
    """
    last = max(1, int(DROPPING * steps))
    places = (-(-last * event // events) for event in range(1, events + 1))  # rounded up
    return tuple(sorted(set(places)))


def geometric(start: float, end: float, progress: float) -> float:
    """Return the value between start and end at a progress from 0 to 1, falling by equal ratios."""
    return float(start * (end / start) ** progress)


@dataclass(frozen=True)
class PairSize:
    """What a matrix (rows, columns) costs as a factor pair of rank k + extra, in parameters."""

    rows: int
    columns: int
    extra: int

    @property
    def dense(self) -> int:
        """Parameters of the dense matrix."""
        return self.rows * self.columns

    def pair(self, kept: int) -> int:
        """Parameters of the pair with `kept` directions."""
        return (self.rows + self.columns) * (kept + self.extra)

    def stored(self, kept: int) -> int:
        """Parameters of the smaller of the two: a pair beyond break-even is stored as the dense matrix."""
        return min(self.pair(kept), self.dense)


def second_order(first: Tensor, second: Tensor, steps: int, tokens: int) -> Tensor:
    """Return by how much the loss rises when a coefficient s becomes zero, to second order (k,), not negative.

    The rise is -s dL/ds + ½ s² d²L/ds² (2605.01627). With e = s dL/ds of one step's mean loss over B tokens, the
    curvature is Fisher's: B times the variance of s dL/ds over steps, as the tokens' gradients spread it. What the
    mean of e has beyond its standard error is taken for the slope, the rest for noise: noise alone would say of
    half of the small coefficients that the loss falls without them.

    Args:
        first: Sum of e over the steps, each weighted by `MEMORY` to the power of its age (k,).
        second: The same sum of e² (k,).
        steps: How many steps are in the sums.
        tokens: B.
    """
    weight = (1 - MEMORY**steps) / (1 - MEMORY)
    squared_weight = (1 - MEMORY ** (2 * steps)) / (1 - MEMORY**2)
    samples = weight**2 / squared_weight
    mean, square = first.double() / weight, second.double() / weight
    variance = (square - mean.square()).clamp_min(0) * samples / (samples - 1) if steps > 1 else square
    error = (variance / samples).sqrt()
    slope = mean.sign() * (mean.abs() - error).clamp_min(0)
    return (0.5 * tokens * variance - slope).clamp_min(0)


def thresholds(importance: Tensor, held: float = 1.0) -> Tensor:
    """Return for each direction the fraction above which it is kept (k,), float64.

    It is the share of the importance at the beginning that more important directions hold together: a direction is
    needed if these do not reach the fraction. The most important one has threshold 0; where all importances are
    zero, the others are never needed.

    Args:
        importance: Of the directions that are left (k,), not negative.
        held: Share of the importance at the beginning that these directions held at the last event. Importances
            of different events differ in scale, their shares do not.
    """
    values, order = importance.double().sort(descending=True, stable=True)
    total = values.sum()
    before = torch.cat([values.new_zeros(1), values.cumsum(0)[:-1]])
    needed = held * before / total if bool(total > 0) else (before.new_ones(len(values)))
    needed[0] = 0.0
    result = torch.empty_like(needed)
    result[order] = needed
    return result


def kept(needed: Tensor, fraction: float) -> Tensor:
    """Return which directions are kept at a fraction, ascending indices of `thresholds`; at least one is."""
    return torch.nonzero(needed < max(fraction, torch.finfo(torch.float64).tiny)).flatten()


def common_fraction(
    needed: Sequence[Tensor], sizes: Sequence[PairSize], allowed: int, *, stored: bool
) -> float:
    """Return the largest fraction at which all matrices together hold at most `allowed` parameters.

    The parameters are a step function of the fraction that rises at the thresholds, so that these, in order, are
    all that has to be tried: exact where a bisection would be close.

    Args:
        needed: `thresholds` of each matrix.
        sizes: Their sizes, in the same order.
        allowed: Parameters of all matrices.
        stored: Count what is stored at the end, else factor pairs.
    """
    total, steps = 0, []
    for thresholds_of_one, size in zip(needed, sizes, strict=True):
        cost = size.stored if stored else size.pair
        costs = torch.tensor([cost(k) for k in range(len(thresholds_of_one) + 1)])
        total += int(costs[0])
        steps.append(costs.diff())
    places, order = torch.cat([item.sort().values.cpu() for item in needed]).sort(stable=True)
    after = total + torch.cat(steps)[order].cumsum(0)
    fitting = int((after <= allowed).sum())
    return 1.0 if fitting == len(places) else float(places[fitting])


def parameters(needed: Sequence[Tensor], sizes: Sequence[PairSize], fraction: float, *, stored: bool) -> int:
    """Return the parameters of all matrices at a fraction, counted as in `common_fraction`."""
    counts = [len(kept(item, fraction)) for item in needed]
    return sum(
        size.stored(count) if stored else size.pair(count) for size, count in zip(sizes, counts, strict=True)
    )


def folded(left: Tensor, values: Tensor, right: Tensor, left_add: Tensor, right_add: Tensor) -> Tensor:
    """Return U diag(s) V + U_add V_add (out, in) in float64; its rank is at most the directions of both."""
    first = (left.double() * values.double()) @ right.double()
    return first + left_add.double() @ right_add.double()

"""Norms in which an approximation error is measured: second moments of inputs and of output gradients.

With C the mean of x xᵀ over tokens, the mean of |(W - Ŵ) x|² is the squared Frobenius norm of (W - Ŵ) S for any
S with S Sᵀ = C. The symmetric root C^½ is one such S; the Cholesky factor used here is another that gives the
same norm and the same best approximation (2403.07378), at a fraction of an eigendecomposition's cost and
exact to float64 however far the eigenvalues lie apart. Output gradients with second moment G weigh rows alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.threads import one_thread

# Share of the mean eigenvalue added to every one: directions that no token reached still count a little.
DAMPING = 0.01
# The factor is computed in float64; beyond this size it is kept, and multiplied with, in float32.
FLOAT64_UP_TO = 1024


@dataclass(frozen=True)
class Metric:
    """A damped second moment M = S Sᵀ, block-diagonal, by its factor.

    Args:
        roots: The blocks of S along the axis, lower triangular (n_i, n_i), or (n_i,) where diagonal.
        damping: What was added to the diagonal of each block.
    """

    roots: tuple[Tensor, ...]
    damping: tuple[float, ...]

    @classmethod
    @one_thread()
    def of(cls, second: Tensor, damping: float = DAMPING) -> Metric:
        """Return the metric of a second moment (n, n), or (n,) where only its diagonal is known.

        A moment that is zero throughout says nothing, and weighs all directions alike.

        Raises:
            ValueError: If the moment is not finite, not square, or not positive semidefinite.
        """
        if second.ndim not in (1, 2) or second.shape[0] != second.shape[-1]:
            raise ValueError(
                f"a second moment of shape {tuple(second.shape)} is neither square nor a diagonal"
            )
        wide = second.to(torch.float64)
        diagonal = wide if second.ndim == 1 else wide.diagonal()
        if not torch.isfinite(wide).all() or float(diagonal.min()) < 0:
            raise ValueError("a second moment has entries that are not finite, or a negative diagonal")
        added = damping * float(diagonal.mean()) or 1.0
        if second.ndim == 1:
            return cls(((wide + added).sqrt(),), (added,))
        # Of a large moment there should not be more copies than needed.
        symmetric = wide.clone() if torch.equal(wide, wide.T) else (wide + wide.T) / 2
        del wide
        symmetric.diagonal().add_(added)
        root, failed = torch.linalg.cholesky_ex(symmetric)
        if int(failed):
            raise ValueError("a second moment has a negative eigenvalue")
        return cls((root.to(torch.float32) if len(root) > FLOAT64_UP_TO else root,), (added,))

    @classmethod
    def stacked(cls, metrics: Iterable[Metric]) -> Metric:
        """Return the block-diagonal metric of members that stand below each other."""
        parts = list(metrics)
        return cls(
            tuple(root for part in parts for root in part.roots),
            tuple(added for part in parts for added in part.damping),
        )

    @property
    def size(self) -> int:
        """Length of the axis."""
        return sum(root.shape[0] for root in self.roots)

    def columns(self, W: Tensor) -> Tensor:
        """Return W S for W (m, n): its columns weighted."""
        parts = [part * root if root.ndim == 1 else product(part, root) for part, root in self._cut(W)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def rows(self, W: Tensor) -> Tensor:
        """Return Sᵀ W for W (n, m): its rows weighted."""
        return self.columns(W.mT).mT

    def unweighted(self, A: Tensor) -> Tensor:
        """Return A S^-1 for A (m, n), which undoes `columns`."""
        parts = [part / root if root.ndim == 1 else _solve_root(part, root) for part, root in self._cut(A)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def target(self, W: Tensor, cross: Tensor | None = None) -> Tensor:
        """Return W* S (m, n) in float64, W* being the map of the present inputs that comes closest to W x₀.

        With X = E[x₀ xᵀ] the mean of |W x₀ - W* x|² is least at W* = W (X + εI)(C + εI)^-1, ε the damping, which
        is W itself where X = C. Without a cross moment W* = W.

        Args:
            W: (m, n).
            cross: X (n, n), x₀ the input of the dense model.

        Raises:
            ValueError: If a cross moment is given and the metric has more than one block.
        """
        if cross is None:
            return self.columns(W)
        if len(self.roots) != 1:
            raise ValueError(f"a cross moment goes with one block, not with {len(self.roots)}")
        root, added = self.roots[0], self.damping[0]
        wide = W.to(root.dtype)
        aimed = product(wide, cross.to(root.dtype)) + added * wide
        return aimed / root if root.ndim == 1 else _solve_root(aimed, root.mT, upper=True)

    def _cut(self, W: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the columns that belong to each block, with its root."""
        sizes = [root.shape[0] for root in self.roots]
        for part, root in zip(torch.split(W, sizes, dim=1), self.roots, strict=True):
            yield part.to(root.dtype), root


@one_thread()
def _solve_root(A: Tensor, root: Tensor, *, upper: bool = False) -> Tensor:
    """Return A S^-1 for a triangular S."""
    solved: Tensor = torch.linalg.solve_triangular(root, A, upper=upper, left=False)
    return solved


@one_thread()
def conditional_variances(second: Tensor, damping: float = DAMPING) -> Tensor:
    """Return the variance of each input given all that come after it (n,), float64, of a damped second moment (n, n).

    They are the squared diagonal of a Cholesky factor. The damping keeps float32 exact enough for that.

    Raises:
        ValueError: If the moment is not finite, or not positive semidefinite.
    """
    reverse = second.to(torch.float32).flip(0, 1)
    mean = float(reverse.diagonal().mean())
    if not math.isfinite(mean):
        raise ValueError("a second moment has entries that are not finite")
    reverse.diagonal().add_(damping * mean or 1.0)
    root, failed = torch.linalg.cholesky_ex(reverse)
    if int(failed):
        raise ValueError("a second moment has a negative eigenvalue")
    variances: Tensor = root.diagonal().double().square().flip(0)
    return variances

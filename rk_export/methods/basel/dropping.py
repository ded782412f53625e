"""Which directions go at an event of basis selection, all matrices judged together (2405.15877)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rk_export.options.ranks import RankRule
from rk_export.passes.numerics.basis import (
    PairSize,
    common_fraction,
    drop_steps,
    geometric,
    kept,
    parameters,
    thresholds,
)


class Dropping:
    """The schedule of a selection, and what share of its importance each matrix still holds.

    Args:
        rank: What is kept at the end: a share of the parameters (`keep`), or of the importance (`energy`).
        steps: Training steps.
        events: How often directions are dropped.
        sizes: Of the matrices.
        counts: How many directions each has at the beginning.

    Attributes:
        held: Share of its importance at the beginning that each matrix holds, as its directions were judged at the
            events so far.
    """

    def __init__(
        self, rank: RankRule, steps: int, events: int, sizes: Sequence[PairSize], counts: Sequence[int]
    ) -> None:
        self._rank, self._sizes = rank, list(sizes)
        self._steps = drop_steps(steps, events)
        self._dense = sum(size.dense for size in sizes)
        self._start = sum(size.pair(count) for size, count in zip(sizes, counts, strict=True))
        self.held = [1.0] * len(self._sizes)

    def is_due(self, step: int) -> bool:
        """Whether directions are dropped after so many steps."""
        return step in self._steps

    def chosen(self, step: int, importances: Sequence[Tensor]) -> list[Tensor]:
        """Return which directions of each matrix are kept after so many steps, ascending positions.

        Args:
            step: Steps done; `is_due`.
            importances: Of the directions that are left of each matrix (k,), not negative.
        """
        needed = [thresholds(item, held) for item, held in zip(importances, self.held, strict=True)]
        fraction = self._fraction(needed, (self._steps.index(step) + 1) / len(self._steps))
        choices = [kept(item, fraction) for item in needed]
        for place, (importance, index) in enumerate(zip(importances, choices, strict=True)):
            total = float(importance.sum())
            self.held[place] *= float(importance[index].sum()) / total if total else 1.0
        return choices

    def _fraction(self, needed: list[Tensor], progress: float) -> float:
        """Return the fraction of the importance that every matrix keeps.

        A share of the parameters is reached by way of the pairs' parameters, which fall by equal ratios from those
        of all directions to those at the fraction that reaches the share now.
        """
        if self._rank.kind == "energy":
            return geometric(1.0, self._rank.value, progress)
        final = common_fraction(needed, self._sizes, int(self._rank.value * self._dense), stored=True)
        if progress >= 1:
            return final
        end = parameters(needed, self._sizes, final, stored=False)
        allowed = int(geometric(self._start, end, progress))
        return max(final, common_fraction(needed, self._sizes, allowed, stored=False))

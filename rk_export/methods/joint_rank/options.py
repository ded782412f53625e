"""Data-free joint rank-k approximation (2402.16319) as published; the planner's rank rule does the work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rk_export.options.calibration import UNWEIGHED
from rk_export.options.method import MethodOptions, Stage
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.recipe import Recipe


@dataclass(frozen=True)
class JointRankOptions(MethodOptions):
    """Data-free joint rank-k approximation (2402.16319); nothing is left open but how much is kept."""

    name: ClassVar[str] = "joint-rank"
    stage: ClassVar[Stage] = "decide"
    asked_by: ClassVar[str] = "--method joint-rank"
    by_name: ClassVar[bool] = True

    @classmethod
    def needed(cls) -> str:
        """Return what says how much stays, for messages."""
        return f"{super().needed()}, or --rank K"

    def recipe(self, amount: RankRule | Budget) -> Recipe:
        """Return the method as published: q/k and gate/up joined, floats, no metric."""
        if not isinstance(amount, RankRule):
            raise TypeError("joint rank-k approximation takes a rank rule")
        return Recipe(
            rank=amount,
            quant=None,
            embedding_quant=None,
            prepare=(),
            quantizer="rtn",
            calibration=UNWEIGHED,
        )

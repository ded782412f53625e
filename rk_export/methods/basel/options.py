"""What basis selection for a target task (2405.15877) is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, cast

from rk_export.errors import FieldError
from rk_export.options.choices import require_choice
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.step import MethodOptions, Stage
from rk_export.options.texts import TextSource


@dataclass(frozen=True)
class BaselOptions(MethodOptions):
    """Basis selection for a target task (2405.15877).

    Args:
        target: The text of the task, a UTF-8 file.
        keep: Share of the parameters of all linear layers that stays at the end.
        energy: Share of the importances that stays at the end, instead of `keep`.
        steps: Training steps while directions are dropped.
        tune: Steps that train the factors afterwards, ranks fixed.
        batch_tokens: Tokens of a step.
        new_basis: Rank of the new bases of every matrix.
        events: How often directions are dropped, spread evenly over the first three quarters of the steps.
        importance: What a direction is judged by: `magnitude` of its coefficient (the paper's), `gradient` for
            |coefficient x gradient|, or `second-order` for the loss' quadratic increase without it.
        bases: The directions of a matrix: `plain` singular ones (the paper's), or those of the matrix `whitened` by
            the second moment of its inputs on the task's text, which say how much each one matters there.
        form: How factor pairs are stored: `plain`, or `identity`.
        learning_rate: Largest step of a tensor, relative to its root mean square.
        seed: Of the order of the text and of the new bases.
    """

    name: ClassVar[str] = "basel"
    stage: ClassVar[Stage] = "decide"
    trained: ClassVar[str] = "was trained for a task"

    target: TextSource
    keep: float | None = None
    energy: float | None = None
    steps: int = 200
    tune: int = 0
    batch_tokens: int = 1024
    new_basis: int = 32
    events: int = 100
    importance: Literal["magnitude", "gradient", "second-order"] = "magnitude"
    bases: Literal["plain", "whitened"] = "plain"
    form: Literal["plain", "identity"] = "plain"
    learning_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        choices = ("magnitude", "gradient", "second-order")
        require_choice("importance", self.importance, choices, "basel.importance")
        require_choice("choice", self.bases, ("plain", "whitened"), "basel.bases")
        require_choice("form", self.form, ("plain", "identity"), "basel.form")
        self.require_least(steps=1, tune=0, batch_tokens=1, new_basis=0, events=1)
        self.require_positive("learning_rate")
        if (self.keep is None) == (self.energy is None):
            raise FieldError("it ends at one share", where="basel", fix="give keep or energy")
        _ = self.rule  # it refuses what is no share

    @property
    def rule(self) -> RankRule:
        """How much is kept at the end: of the parameters, or of the importances."""
        if self.keep is not None:
            return RankRule("keep", self.keep)
        return RankRule("energy", cast(float, self.energy))

    def with_amount(self, budget: Budget) -> BaselOptions:
        """Return the step at another share of the parameters."""
        if budget.kind != "keep":
            raise FieldError("basis selection ends at a share", where=budget.flag, fix="give --keep SHARE")
        return replace(self, keep=budget.amount, energy=None)

    def with_texts(self, files: tuple[Path, ...]) -> BaselOptions:
        """Return the step with the path of the task's text, if it is among some files."""
        return replace(self, target=self.target.found_in(files))

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return f"basis selection for the task of {self.target.name} (arXiv 2405.15877)"

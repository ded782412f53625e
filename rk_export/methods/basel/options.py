"""What basis selection for a target task (2405.15877) is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.calibration import UNWEIGHED
from rk_export.options.choices import require_choice
from rk_export.options.method import MethodOptions, Stage, flag
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.texts import TextFile


@dataclass(frozen=True)
class BaselOptions(MethodOptions):
    """Basis selection for a target task (2405.15877); how much is kept is the rank rule's affair.

    Args:
        target: UTF-8 text of the task.
        steps: Training steps while directions are dropped.
        tune: Steps that train the factors afterwards, ranks fixed.
        batch_tokens: Tokens of a step.
        new_basis: Rank of the new bases of every matrix.
        events: How often directions are dropped, spread evenly over the first three quarters of the steps.
        importance: What a direction is judged by: `magnitude` of its coefficient (the paper's), `gradient` for
            |coefficient x gradient|, or `second-order` for the loss' quadratic increase without it.
        bases: The directions of a matrix: `plain` singular ones (the paper's), or those of the matrix `whitened` by
            the second moment of its inputs on the task's text, which say how much each one matters there.
        learning_rate: Largest step of a tensor, relative to its root mean square.
        seed: Of the order of the text and of the new bases.
    """

    name: ClassVar[str] = "basel"
    stage: ClassVar[Stage] = "decide"
    asked_by: ClassVar[str] = "--method basel"
    by_name: ClassVar[bool] = True
    trained: ClassVar[str] = "was trained for a task"

    target: TextFile = flag("--target", "text of the task, UTF-8", read=TextFile.of, metavar="FILE")
    steps: int = flag("--steps", "steps of training (default 200)", default=200, read=int)
    tune: int = flag("--tune", "steps that train the factors afterwards (default 0)", default=0, read=int)
    batch_tokens: int = 1024
    new_basis: int = flag("--new-basis", "rank of the new bases (default 32)", default=32, read=int)
    events: int = 100
    importance: Literal["magnitude", "gradient", "second-order"] = flag(
        "--importance",
        "magnitude, gradient or second-order (default magnitude, the paper's)",
        default="magnitude",
    )
    bases: Literal["plain", "whitened"] = flag(
        "--bases", "plain directions (default, the paper's) or whitened by the task's inputs", default="plain"
    )
    learning_rate: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        choices = ("magnitude", "gradient", "second-order")
        require_choice("importance", self.importance, choices, "--importance")
        require_choice("choice", self.bases, ("plain", "whitened"), "--bases")
        self.require_least(steps=1, tune=0, batch_tokens=1, new_basis=0, events=1)
        if not math.isfinite(self.learning_rate) or self.learning_rate <= 0:
            raise FieldError(
                f"a learning rate of {self.learning_rate}", where=self.name, fix="give a number above 0"
            )

    def check_with(self, recipe: Recipe) -> None:
        """Refuse anything but a share of the parameters or of the importances."""
        if recipe.rank is None or recipe.rank.kind == "rank" or recipe.budget is not None:
            raise FieldError(
                "basis selection ends at a kept share of the parameters, or of the importances",
                where=self.name,
                fix=f"give {self.needed()}, and no other budget",
            )

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return f"basis selection for the task of {self.target.name} (arXiv 2405.15877)"

    def recipe(self, amount: RankRule | Budget) -> Recipe:
        """Return basis selection as published: floats, and nothing weighed but by its own training."""
        if not isinstance(amount, RankRule):
            raise TypeError("basis selection takes a rank rule")
        return Recipe(
            groups=(),
            rank=amount,
            methods=(self,),
            quant=None,
            embedding_quant=None,
            prepare=(),
            quantizer="rtn",
            calibration=UNWEIGHED,
        )

"""What sparse and low rank together (SSLC, 2510.26446) is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.method import MethodOptions, Stage
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.recipe import Recipe


@dataclass(frozen=True)
class SslcOptions(MethodOptions):
    """Sparse and low rank fitted to each other under the inputs (2510.26446); the budget says how much may be kept.

    Args:
        stages: In how many stages the entries go that are not kept; after each the others make up for them.
    """

    name: ClassVar[str] = "sslc"
    stage: ClassVar[Stage] = "decide"
    asked_by: ClassVar[str] = "--method sslc"
    by_name: ClassVar[bool] = True
    amount: ClassVar[Literal["rank rule", "budget"]] = "budget"
    weighs_outputs: ClassVar[bool] = True
    decides_form: ClassVar[bool] = True

    stages: int = 3

    def __post_init__(self) -> None:
        self.require_least(stages=1)

    def check_with(self, recipe: Recipe) -> None:
        """Refuse anything but a budget of parameters or bytes."""
        if recipe.budget is None or recipe.budget.kind not in ("keep", "size"):
            raise FieldError(
                "sparse and low rank parts are paid from a budget of parameters or bytes",
                where=self.name,
                fix=f"give {self.needed()}",
            )

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return "sparse and low-rank matrices fitted to each other (arXiv 2510.26446)"

    def recipe(self, amount: RankRule | Budget) -> Recipe:
        """Return the method as published: floats, nothing rotated before, which would spread the large entries."""
        if not isinstance(amount, Budget):
            raise TypeError("sparse and low rank together take a budget")
        return Recipe(groups=(), budget=amount, methods=(self,), quant=None, embedding_quant=None, prepare=())

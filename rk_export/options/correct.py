"""The step that corrects the error of quantized matrices by a small float branch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rk_export.errors import FieldError
from rk_export.options.step import Stage, Step

if TYPE_CHECKING:
    from rk_export.options.recipe import Recipe


@dataclass(frozen=True)
class Correct(Step):
    """A float branch beside every dense quantized matrix that corrects its error.

    Args:
        rank: Inner dimension of the branch, at least 1.
    """

    name: ClassVar[str] = "correct"
    stage: ClassVar[Stage] = "correct"

    rank: int

    def __post_init__(self) -> None:
        self.require_least(rank=1)

    def check_with(self, recipe: Recipe) -> None:
        """Refuse what leaves no dense matrix in weight-only formats, and budgets."""
        if recipe.quant is None or recipe.quant.activations == 8:
            raise FieldError(
                "only weight-only quantization is corrected",
                where=self.name,
                fix="add a step quantize before it",
            )
        if recipe.deciding is not None:
            raise FieldError(
                f"{recipe.deciding.name} leaves factor pairs, and only dense quantized matrices are corrected",
                where=self.name,
                fix="drop it",
            )
        if recipe.budget is not None:
            raise FieldError(
                "a budget does not price corrections", where=self.name, fix="drop one of the two"
            )

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return f"error correction of rank {self.rank}"

"""What global rank and sparsity optimization (2505.03801) is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.choices import require_choice
from rk_export.options.method import MethodOptions, Stage, flag
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.recipe import Recipe


@dataclass(frozen=True)
class CapOptions(MethodOptions):
    """Global rank and sparsity optimization (2505.03801); the budget says how much may be kept.

    Args:
        iterations: Of the alternating directions that split a matrix into low rank and sparse, for the policy.
        selector: `policy` is the paper's policy gradient over the parts of the split, `pools` takes of the same
            parts those of largest predicted gain per price. `auction`, ours, leaves the split aside and spends the
            budget on mixtures of rank and entries that are fitted anew. `wanda` (2306.11695) and `magnitude` keep
            entries only, as many in every row or matrix.
        steps: Updates of the policy, one forward pass each.
        learning_rate: Of the policy.
        window: Losses that the moving baseline averages.
        batch_tokens: Tokens of an update.
        seed: Of the policy's draws.
    """

    name: ClassVar[str] = "cap"
    stage: ClassVar[Stage] = "decide"
    asked_by: ClassVar[str] = "--method cap"
    by_name: ClassVar[bool] = True
    amount: ClassVar[Literal["rank rule", "budget"]] = "budget"
    weighs_outputs: ClassVar[bool] = True
    decides_form: ClassVar[bool] = True

    iterations: int = 10
    selector: Literal["policy", "pools", "auction", "wanda", "magnitude"] = flag(
        "--selector", "policy (default, the paper's), pools, auction, wanda or magnitude", default="policy"
    )
    steps: int = flag("--steps", "steps of the search (default 100)", default=100, read=int)
    learning_rate: float = 0.05
    window: int = 5
    batch_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        choices = ("policy", "pools", "auction", "wanda", "magnitude")
        require_choice("selector", self.selector, choices, "--selector")
        self.require_least(iterations=1, steps=1, window=1, batch_tokens=1)
        if not math.isfinite(self.learning_rate) or self.learning_rate <= 0:
            raise FieldError(
                f"a learning rate of {self.learning_rate}", where=self.name, fix="give a number above 0"
            )

    def check_with(self, recipe: Recipe) -> None:
        """Refuse anything but a budget of parameters or bytes."""
        if recipe.rank is not None:
            raise FieldError(
                "a rank rule does not say how much is sparse", where=self.name, fix=f"give {self.needed()}"
            )
        if recipe.budget is None or recipe.budget.kind not in ("keep", "size"):
            raise FieldError(
                "low rank and sparse parts are paid from a budget of parameters or bytes",
                where=self.name,
                fix=f"give {self.needed()}",
            )

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return "low rank plus sparse matrices (arXiv 2505.03801)"

    def recipe(self, amount: RankRule | Budget) -> Recipe:
        """Return the method as published: floats.

        Matrices are not rotated before: that would spread the entries that the sparse part is to hold.
        """
        if not isinstance(amount, Budget):
            raise TypeError("global rank and sparsity optimization takes a budget")
        return Recipe(groups=(), budget=amount, methods=(self,), quant=None, embedding_quant=None, prepare=())

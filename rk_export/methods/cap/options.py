"""What global rank and sparsity optimization (2505.03801) is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rk_export.options.choices import require_choice
from rk_export.options.ranks import Budget, Bytes, share_and_size, share_or_size
from rk_export.options.step import MethodOptions, Stage


@dataclass(frozen=True)
class CapOptions(MethodOptions):
    """Global rank and sparsity optimization (2505.03801).

    Args:
        keep: Share of all parameters of the matrices that stays, rank and entries together.
        size: Bytes of the model's files, such as `90MB`, instead of `keep`.
        selector: `policy` is the paper's policy gradient over the parts of the split, `pools` takes of the same
            parts those of largest predicted gain per price. `auction`, ours, leaves the split aside and spends the
            budget on mixtures of rank and entries that are fitted anew. `wanda` (2306.11695) and `magnitude` keep
            entries only, as many in every row or matrix.
        steps: Updates of the policy, one forward pass each.
        iterations: Of the alternating directions that split a matrix into low rank and sparse, for the policy.
        learning_rate: Of the policy.
        window: Losses that the moving baseline averages.
        batch_tokens: Tokens of an update.
        seed: Of the policy's draws.
    """

    name: ClassVar[str] = "cap"
    stage: ClassVar[Stage] = "decide"
    weighs_outputs: ClassVar[bool] = True

    keep: float | None = None
    size: Bytes | None = None
    selector: Literal["policy", "pools", "auction", "wanda", "magnitude"] = "policy"
    steps: int = 100
    iterations: int = 10
    learning_rate: float = 0.05
    window: int = 5
    batch_tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        choices = ("policy", "pools", "auction", "wanda", "magnitude")
        require_choice("selector", self.selector, choices, "cap.selector")
        self.require_least(iterations=1, steps=1, window=1, batch_tokens=1)
        self.require_positive("learning_rate")
        _ = self.budget  # it refuses anything but one amount

    @property
    def budget(self) -> Budget:
        """What low rank and sparse parts may cost together."""
        return share_or_size(self.name, self.keep, self.size)

    def with_amount(self, budget: Budget) -> CapOptions:
        """Return the step at another share or size."""
        keep, size = share_and_size(self.name, budget)
        return replace(self, keep=keep, size=size)

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return "low rank plus sparse matrices (arXiv 2505.03801)"

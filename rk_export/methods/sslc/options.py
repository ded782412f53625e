"""What sparse and low rank together (SSLC, 2510.26446) is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from rk_export.options.ranks import Budget, Bytes, share_and_size, share_or_size
from rk_export.options.step import MethodOptions, Stage


@dataclass(frozen=True)
class SslcOptions(MethodOptions):
    """Sparse and low rank fitted to each other under the inputs (2510.26446).

    Args:
        keep: Share of all parameters of the matrices that stays, rank and entries together.
        size: Bytes of the model's files, such as `90MB`, instead of `keep`.
        stages: In how many stages the entries go that are not kept; after each the others make up for them.
    """

    name: ClassVar[str] = "sslc"
    stage: ClassVar[Stage] = "decide"
    weighs_outputs: ClassVar[bool] = True

    keep: float | None = None
    size: Bytes | None = None
    stages: int = 3

    def __post_init__(self) -> None:
        self.require_least(stages=1)
        _ = self.budget  # it refuses anything but one amount

    @property
    def budget(self) -> Budget:
        """What low rank and sparse parts may cost together."""
        return share_or_size(self.name, self.keep, self.size)

    def with_amount(self, budget: Budget) -> SslcOptions:
        """Return the step at another share or size."""
        keep, size = share_and_size(self.name, budget)
        return replace(self, keep=keep, size=size)

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return "sparse and low-rank matrices fitted to each other (arXiv 2510.26446)"

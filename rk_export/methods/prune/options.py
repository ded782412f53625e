"""What structured pruning is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rk_export.errors import FieldError
from rk_export.options.step import MethodOptions, Stage


@dataclass(frozen=True)
class PruneOptions(MethodOptions):
    """Whole structures that go before anything else, alike in all blocks.

    Args:
        blocks: How many decoder blocks are dropped: those that change their input least.
        ffn_keep: Share of every MLP's neurons that stays; 1 keeps all.
        kv_heads_keep: Key/value heads of every block that stay, each with its query heads. Without it all stay.
    """

    name: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = "prune"
    weighs_outputs: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    blocks: int = 0
    ffn_keep: float = 1.0
    kv_heads_keep: int | None = None

    def __post_init__(self) -> None:
        self.require_least(blocks=0)
        if not 0 < self.ffn_keep <= 1:
            raise FieldError(
                f"{self.ffn_keep} is not a share between 0 and 1",
                where="prune.ffn_keep",
                fix="0.9 keeps nine tenths of the neurons",
            )
        if self.kv_heads_keep is not None:
            self.require_least(kv_heads_keep=1)
        if (self.blocks, self.ffn_keep, self.kv_heads_keep) == (0, 1.0, None):
            raise FieldError("nothing goes", where="prune", fix="name what goes, or leave the step out")

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return "structured pruning"

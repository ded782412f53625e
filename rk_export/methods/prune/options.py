"""What structured pruning is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rk_export.errors import FieldError
from rk_export.options.method import MethodOptions, Stage, flag


@dataclass(frozen=True)
class PruneOptions(MethodOptions):
    """Whole structures that go before anything else, alike in all blocks.

    Args:
        blocks: How many decoder blocks go, those that change their input least.
        ffn: Share of every MLP's neurons that stays; 1 keeps all.
        kv_groups: Key/value heads of every block that stay, each with its query heads; None keeps all.
    """

    name: ClassVar[str] = "prune"
    stage: ClassVar[Stage] = "prune"
    asked_by: ClassVar[str] = "pruning"
    weighs_outputs: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True

    blocks: int = flag("--prune-blocks", "drop so many blocks, those that change least", default=0, read=int)
    ffn: float = flag("--prune-ffn", "share of every MLP's neurons to keep", default=1.0, read=float)
    kv_groups: int | None = flag(
        "--prune-heads", "key/value heads of every block to keep", default=None, read=int
    )

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise FieldError(f"{self.blocks} blocks", where="--prune-blocks", fix="give 0 or more")
        if not 0 < self.ffn <= 1:
            raise FieldError(
                f"{self.ffn} is not a share between 0 and 1",
                where="--prune-ffn",
                fix="0.9 keeps nine tenths of the neurons",
            )
        if self.kv_groups is not None and self.kv_groups < 1:
            raise FieldError(
                f"{self.kv_groups} key/value heads", where="--prune-heads", fix="keep at least 1"
            )
        if (self.blocks, self.ffn, self.kv_groups) == (0, 1.0, None):
            raise FieldError("nothing goes", where="prune", fix="name what goes, or leave it out")

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return "structured pruning"

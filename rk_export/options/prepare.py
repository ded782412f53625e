"""The step that reparameterizes a model exactly before anything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.step import Stage, Step, listed

# Exact reparameterizations, in the order in which they are applied.
PREPARATIONS = ("fold", "rotate", "rotate-heads", "scale")
# `fold` for the norms in front of one kind of block alone.
PARTS_OF_FOLD = ("fold-attention", "fold-mlp")


@dataclass(frozen=True)
class Prepare(Step):
    """Exact reparameterizations: the model computes the same logits with other weights.

    Args:
        names: `fold` multiplies the gains of norms into the matrices after them. `rotate` rotates the hidden states
            (it needs `fold`), `rotate-heads` the value heads. `scale` evens out the peaks of FFN neurons.
            `fold-attention` and `fold-mlp` are `fold` for one kind of block. `auto` takes those that lower the
            predicted loss.
    """

    name: ClassVar[str] = "prepare"
    stage: ClassVar[Stage] = "prepare"
    bare: ClassVar[str | None] = "names"

    names: Literal["auto"] | tuple[str, ...] = listed("auto")

    def __post_init__(self) -> None:
        if self.names == "auto":
            return
        known = (*PREPARATIONS, *PARTS_OF_FOLD)
        if isinstance(self.names, str) or (unknown := [name for name in self.names if name not in known]):
            shown = self.names if isinstance(self.names, str) else unknown[0]
            raise FieldError(
                f"unknown preparation {shown!r}",
                where=self.name,
                fix=f"choose auto, or from {', '.join(known)}",
            )
        if "rotate" in self.names and "fold" not in self.names:
            raise FieldError("rotate needs fold", where=self.name, fix="add fold: [fold, rotate]")

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return "exact reparameterization"

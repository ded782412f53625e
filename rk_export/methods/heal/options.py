"""What recovery is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.choices import require_choice
from rk_export.options.step import MethodOptions, Stage, listed

# What can be trained: factors (pairs, corrections, and reduced heads), norm gains, biases, and the scales of
# quantized matrices. Codes, zero points, dense matrices and embeddings stay.
TRAINABLE = ("factors", "norms", "biases", "scales")


@dataclass(frozen=True)
class HealOptions(MethodOptions):
    """How a recovery trains.

    Args:
        steps: Optimizer steps.
        batch_tokens: Tokens per step, rounded down to whole sequences, at least one.
        learning_rate: Largest step of a tensor, relative to its root mean square.
        warmup: Share of the steps in which the rate rises to its largest; it falls as a cosine afterwards.
        seed: Of the order of the sequences.
        temperature: Divides the logits of both models.
        what: What is trained, names from `TRAINABLE`.
        precision: Of the matrix products; `auto` is bf16 where the device multiplies bf16 itself.
    """

    name: ClassVar[str] = "heal"
    stage: ClassVar[Stage] = "recover"
    sized_by_shapes: ClassVar[bool] = True
    reads_text: ClassVar[bool] = True
    trained: ClassVar[str] = "was healed"

    steps: int
    batch_tokens: int = 1024
    learning_rate: float = 3e-4
    warmup: float = 0.1
    seed: int = 0
    temperature: float = 1.0
    what: tuple[str, ...] = listed(TRAINABLE)
    precision: Literal["auto", "fp32", "bf16"] = "auto"

    def __post_init__(self) -> None:
        self.require_least(steps=1, batch_tokens=2)
        self.require_positive("learning_rate", "temperature")
        if not 0 <= self.warmup < 1:
            raise FieldError(
                f"{self.warmup} is no share of the steps", where="heal.warmup", fix="0.1 is a tenth"
            )
        if not self.what or set(self.what) - set(TRAINABLE):
            raise FieldError(
                f"cannot train {list(self.what)}",
                where="heal.what",
                fix=f"choose from {', '.join(TRAINABLE)}",
            )
        require_choice("precision", self.precision, ("auto", "fp32", "bf16"), "heal.precision")

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        return "recovery by distillation"

    def rate(self, step: int) -> float:
        """Return the share of the learning rate at a step from 0 to steps - 1."""
        rising = self.warmup * self.steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return 0.5 + 0.5 * math.cos(math.pi * (step - rising) / (self.steps - rising))

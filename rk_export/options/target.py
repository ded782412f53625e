"""Where a bundle will run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rk_export.errors import FieldError
from rk_export.options.choices import require_choice

# Parity is measured on prompts of 32 tokens, and on what follows them.
SHORTEST_CONTEXT = 64

GraphTarget = Literal["cpu", "cuda", "portable"]


@dataclass(frozen=True)
class Target:
    """Where a bundle will run. It changes the graph, not what is decided about the weights.

    Args:
        ep: The execution provider that the graph is made for: `cpu` (fp32), `cuda` (fp16) or `portable` (fp16).
        accuracy_level: How MatMulNBits computes on a CPU: 4 in int8, 0 in floats.
        context_length: Tokens of prompt and answer together that the bundle takes, at least 64. Without it the
            model's own context.
    """

    ep: GraphTarget = "cpu"
    accuracy_level: int = 4
    context_length: int | None = None

    def __post_init__(self) -> None:
        require_choice("execution provider", self.ep, ("cpu", "cuda", "portable"), "target.ep")
        require_choice("level", self.accuracy_level, (0, 1, 4), "target.accuracy_level")
        if self.context_length is not None and self.context_length < SHORTEST_CONTEXT:
            raise FieldError(
                f"a context of {self.context_length} tokens is too short to verify a bundle in",
                where="target.context_length",
                fix=f"give at least {SHORTEST_CONTEXT}",
            )

    @property
    def float_dtype(self) -> Literal["fp32", "fp16"]:
        """The float type of the exported graph."""
        return "fp32" if self.ep == "cpu" else "fp16"

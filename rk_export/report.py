"""Findings: what a pass did to each target, and why when it did nothing."""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any


class Outcome(str, enum.Enum):
    """What became of a target."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    REFUSED = "refused"


@dataclass(frozen=True)
class Finding:
    """One pass at one target.

    Args:
        target: Module path or node pattern, e.g. ``layers.3.self_attn.qk``.
        outcome: Applied, skipped or refused.
        reason: Why; must be set unless applied.
        bytes_before: Stored bytes of the target's weights before the pass.
        bytes_after: Stored bytes afterwards, scales and zero points included.
        error: Relative Frobenius error that the pass introduced, or None where none is defined.
        details: What the pass chose (rank, bits, kept share ...), JSON-ready.
    """

    target: str
    outcome: Outcome
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    error: float | None = None
    details: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.outcome is not Outcome.APPLIED and not self.reason:
            raise ValueError(f"{self.target}: a {self.outcome.value} finding needs a reason")

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        return {**asdict(self), "outcome": self.outcome.value}

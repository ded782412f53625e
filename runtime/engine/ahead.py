"""Guesses of the next tokens, which the model checks in one run: speculative decoding (arXiv:2211.17192).

The answer is the same with guesses and without; only the time differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Drafter(Protocol):
    """Guesses what a model will choose."""

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return guesses of the tokens that follow, at most ``room``; none where a guess would not pay."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many of the last guesses the model would have chosen."""

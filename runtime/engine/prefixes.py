"""Which tokens the kept slots hold, so that a prompt that begins like another one copies what is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rk_export.runtime.engine.rounding import GRAIN

# A shorter beginning costs more to copy, and to keep apart, than to compute.
SHORTEST = 2 * GRAIN


@dataclass(frozen=True)
class Match:
    """A slot that holds the beginning of a prompt.

    Args:
        slot: The slot.
        positions: How many tokens they have in common.
    """

    slot: int
    positions: int


class KeptPrefixes:
    """The slots behind the running ones: each keeps what a finished request computed, the least recently used goes.

    Args:
        slots: The numbers of these slots.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self._free = list(slots)
        self._held: dict[int, np.ndarray] = {}  # tokens; least recently used first

    def best(self, prompt: np.ndarray, others: Mapping[int, np.ndarray]) -> Match | None:
        """Return the slot that holds most of a prompt, among those kept and others; None where none holds enough.

        The last two tokens of a prompt are always computed: logits of the last one are needed, and one alone would be
        computed as an answer is.
        """
        matches = [
            Match(slot, common(tokens, prompt[:-2]) // GRAIN * GRAIN)
            for slot, tokens in (*self._held.items(), *others.items())
        ]
        best = max(matches, key=lambda match: match.positions, default=None)
        if best is None or best.positions < SHORTEST:
            return None
        if best.slot in self._held:
            self._held[best.slot] = self._held.pop(best.slot)
        return best

    def place(self, tokens: np.ndarray) -> int | None:
        """Return the slot that is to keep tokens, and take note of it; None where they are kept already or too few.

        What begins alike and is shorter gives way.
        """
        if len(tokens) < SHORTEST:
            return None
        for slot, other in list(self._held.items()):
            shared = common(other, tokens)
            if shared == len(tokens):
                self._held[slot] = self._held.pop(slot)
                return None
            if shared == len(other):
                del self._held[slot]
                self._free.append(slot)
        if not self._free and self._held:
            oldest = next(iter(self._held))
            del self._held[oldest]
            self._free.append(oldest)
        if not self._free:
            return None
        slot = self._free.pop()
        self._held[slot] = tokens
        return slot


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length

"""Which tokens the kept slots hold, so that a prompt that begins like another one copies what is there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rk_export.runtime.engine.rounding import GRAIN
from rk_export.runtime.engine.state_slots import State

# A shorter beginning costs more to copy, and to keep apart, than to compute.
SHORTEST = 2 * GRAIN

Marks = dict[int, State]


@dataclass
class Held:
    """What a slot holds of a prompt.

    Args:
        tokens: Those whose keys and values lie in the slot.
        marks: Position -> the states after so many tokens, where the model has some: a prompt can go on only from
            there. None where it can go on from anywhere.
    """

    tokens: np.ndarray
    marks: Marks | None = None

    def usable(self, positions: int) -> int:
        """Return how many of the first positions another prompt may take."""
        if self.marks is None:
            return positions
        return max((mark for mark in self.marks if mark <= positions), default=0)

    def learn(self, other: Held, positions: int) -> None:
        """Take over the states that another one knows of the positions that both have in common."""
        if self.marks is not None and other.marks is not None:
            self.marks |= {mark: state for mark, state in other.marks.items() if mark <= positions}


@dataclass(frozen=True)
class Match:
    """A slot that holds the beginning of a prompt.

    Args:
        slot: The slot.
        positions: How many tokens of it the prompt takes.
        state: The states after them, where the model has some.
    """

    slot: int
    positions: int
    state: State | None = None


class KeptPrefixes:
    """The slots behind the running ones: each keeps what a finished request computed, the least recently used goes.

    Args:
        slots: The numbers of these slots.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self._free = list(slots)
        self._held: dict[int, Held] = {}  # least recently used first

    def best(self, prompt: np.ndarray, others: Mapping[int, Held]) -> Match | None:
        """Return the slot that holds most of a prompt, among those kept and others; None where none holds enough.

        The last two tokens of a prompt are always computed: logits of the last one are needed, and one alone would be
        computed as an answer is.
        """
        matches = [(held.usable(shared), slot, held) for slot, held, shared in self._alike(prompt, others)]
        positions, slot, held = max(matches, key=lambda match: match[0], default=(0, -1, None))
        if held is None or positions < SHORTEST:
            return None
        if slot in self._held:
            self._held[slot] = self._held.pop(slot)
        return Match(slot, positions, None if held.marks is None else held.marks[positions])

    def longest(self, prompt: np.ndarray, others: Mapping[int, Held]) -> int:
        """Return how many tokens a prompt has in common with a slot at most, whether a state is known there or not."""
        return max((shared for _, _, shared in self._alike(prompt, others)), default=0)

    def _alike(self, prompt: np.ndarray, others: Mapping[int, Held]) -> Iterator[tuple[int, Held, int]]:
        for slot, held in (*self._held.items(), *others.items()):
            yield slot, held, common(held.tokens, prompt[:-2]) // GRAIN * GRAIN

    def place(self, new: Held) -> int | None:
        """Return the slot that is to keep tokens, and take note of it; None where they are kept already or too few.

        What begins alike and is shorter gives way.
        """
        if len(new.tokens) < SHORTEST:
            return None
        for slot, other in list(self._held.items()):
            shared = common(other.tokens, new.tokens)
            if shared == len(new.tokens):
                other.learn(new, shared)
                self._held[slot] = self._held.pop(slot)
                return None
            if shared == len(other.tokens):
                new.learn(other, shared)
                del self._held[slot]
                self._free.append(slot)
        if not self._free and self._held:
            oldest = next(iter(self._held))
            del self._held[oldest]
            self._free.append(oldest)
        if not self._free:
            return None
        slot = self._free.pop()
        self._held[slot] = new
        return slot


def common(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many tokens two sequences have in common at their beginning."""
    length = min(len(one), len(other))
    differs = one[:length] != other[:length]
    return int(differs.argmax()) if differs.any() else length

"""Where the states of a prompt are kept, so that a later prompt that begins alike can go on from there.

Keys and values may be copied up to any position; a state is that of the last token computed. So prompts are cut where
another one is likely to part from them, and the states there are kept:

- before the last tokens, where the next turn of a conversation goes on;
- where a prompt parts from one that was computed before: the third one with the same beginning copies it;
- every `FAR` positions of a long prompt, at the end of a chunk.
"""

from __future__ import annotations

from rk_export.runtime.engine.prefixes import SHORTEST, Marks
from rk_export.runtime.engine.rounding import GRAIN
from rk_export.runtime.engine.state_slots import StateSlots

FAR = 512


class ResumePoints:
    """The positions of one prompt whose states are kept.

    Args:
        states: Of all slots.
        tokens: Length of what is computed.
        shared: Tokens at its beginning that an earlier prompt had too; a multiple of `GRAIN`.
    """

    def __init__(self, states: StateSlots, tokens: int, shared: int) -> None:
        self._states = states
        borders = ((tokens - 2) // GRAIN * GRAIN, shared)
        self._borders = sorted({border for border in borders if border >= SHORTEST})
        self._last = 0
        self.marks: Marks = {}

    def end(self, begin: int, end: int) -> int:
        """Return where a chunk that begins at one position is to end, at another one at most."""
        return next((border for border in self._borders if begin < border < end), end)

    def reached(self, slot: int, position: int) -> None:
        """Keep the states of a slot where they are worth it."""
        far = position % GRAIN == 0 and position - self._last >= FAR
        if position in self._borders or far:
            self.marks[position] = self._states.read(slot)
            self._last = position

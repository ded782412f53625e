"""Rows of a LongRoPE model (arXiv:2402.13753): short ones and long ones rotate by other frequencies.

The graph takes the frequencies of a run by the length that it is shown, so the two kinds have a batch each. A row that
grows beyond the short kind is computed again among the long ones, as Hugging Face ``generate`` does.
"""

from __future__ import annotations

from collections import deque

from rk_export.runtime.engine.running import Running
from rk_export.runtime.engine.slot_batch import SlotBatch


class TwoRotations:
    """A batch of short rows and a batch of long ones.

    Args:
        short: Its rows take at most `switch` positions.
        long: Its runs show the graph more than that.
        switch: Longest sequence under the short factors.
    """

    def __init__(self, short: SlotBatch, long: SlotBatch, switch: int) -> None:
        self._short, self._long, self._switch = short, long, switch
        self._crossing = deque[Running]()  # out of the short batch, not yet in the long one

    @property
    def slots(self) -> int:
        """Rows that run together where all of them are short, or all long."""
        return self._short.slots

    @property
    def running(self) -> int:
        """Rows that were added and have not ended."""
        return self._short.running + self._long.running + len(self._crossing)

    @property
    def has_room(self) -> bool:
        """Whether a row of either kind may be added."""
        return self._short.has_room and self._long.has_room and not self._crossing

    def add(self, running: Running) -> None:
        """Add a row to the batch of its kind."""
        (self._long if len(running.tokens) > self._switch else self._short).add(running)

    def drop(self, running: Running) -> None:
        """Take a row out that has not ended; one that is not in here is passed over."""
        if running in self._crossing:
            self._crossing.remove(running)
        self._short.drop(running)
        self._long.drop(running)

    def step(self) -> list[Running]:
        """Step both batches; return the rows that got tokens."""
        self._crossing.extend(self._short.full())
        while self._crossing and self._long.has_room:
            self._long.add(self._crossing.popleft())
        return self._short.step() + self._long.step()

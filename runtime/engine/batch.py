"""Rows that run together, whatever the graph allows; nothing here knows of threads or HTTP."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

import numpy as np

from rk_export.runtime.decoder import Decoder
from rk_export.runtime.engine.running import Running
from rk_export.runtime.generate import Row


class Batch(Protocol):
    """Rows that run together."""

    @property
    def slots(self) -> int:
        """Rows that surely run together."""

    @property
    def running(self) -> int:
        """Rows that were added and have not ended."""

    @property
    def has_room(self) -> bool:
        """Whether a row may be added before the next step."""

    def add(self, running: Running) -> None:
        """Add a row; there must be room."""

    def drop(self, running: Running) -> None:
        """Take a row out that has not ended; one that is not in here is passed over."""

    def step(self) -> list[Running]:
        """Compute a chunk of a prompt and a token of every running row; return the rows that got tokens or failed."""


def run_rows(batch: Batch, rows: Iterable[Row]) -> Iterator[None]:
    """Run rows to their end, yielding after each step.

    Raises:
        RkExportError: No token can be chosen for one of them.
    """
    waiting = deque(map(Running, rows))
    while waiting or batch.running:
        while waiting and batch.has_room:
            batch.add(waiting.popleft())
        for running in batch.step():
            if running.failure is not None:
                raise running.failure
        yield


class OneByOne:
    """Rows one after another, for graphs whose cache cannot be shared among rows of unequal length.

    Args:
        decoders: Makes a fresh decoder for one row of so many positions.
    """

    def __init__(self, decoders: DecoderMaker) -> None:
        self._decoders = decoders
        self._decoder: Decoder | None = None
        self._row: Running | None = None

    @property
    def slots(self) -> int:
        """One."""
        return 1

    @property
    def running(self) -> int:
        """Rows that were added and have not ended: one at most."""
        return int(self._row is not None)

    @property
    def has_room(self) -> bool:
        """Whether no row is running."""
        return self._row is None

    def add(self, running: Running) -> None:
        """Add the row."""
        capacity = len(running.row.prompt) + running.row.limit
        self._row, self._decoder = running, self._decoders(batch=1, capacity=capacity)

    def drop(self, running: Running) -> None:
        """Take the row out."""
        if self._row is running:
            self._row = self._decoder = None

    def step(self) -> list[Running]:
        """Run the whole prompt, or one step."""
        running, decoder = self._row, self._decoder
        if running is None or decoder is None:
            return []
        if running.filled:
            logits = decoder.step(np.array(running.tokens[-1:]))
        else:
            logits = decoder.prefill(np.array([running.row.prompt], np.int64))
        running.filled = len(running.tokens)
        running.advance(logits[0])
        if running.ended:
            self.drop(running)
        return [running]


class DecoderMaker(Protocol):
    """Makes decoders: `Session.decoder`."""

    def __call__(self, *, batch: int, capacity: int) -> Decoder:
        """Return fresh decoding state."""

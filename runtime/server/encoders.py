"""An open encoder bundle: embeddings, one batch after another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np

from rk_export.runtime.encoder import EncoderSession
from rk_export.runtime.engine.records import EngineClosedError, QueueFullError

T = TypeVar("T")

POOLING = "mean"  # over a text's tokens, then scaled to length 1
_BATCH = 16


class EncoderWorker:
    """Runs an encoder in one thread.

    Args:
        session: The bundle.
        queue: Requests that may wait.
    """

    def __init__(self, session: EncoderSession, queue: int) -> None:
        self.session, self._queue = session, queue
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._closed = False
        self.waiting = 0

    async def embed(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return one unit vector per row of tokens, float32 [rows, hidden]; a batch is never divided by others.

        Raises:
            InputError: A row is empty, too long or has an unknown token.
            QueueFullError: Too many requests wait.
        """
        found = []
        with self._place():
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                found.append(await self._in_thread(partial(self.session.embed_tokens, batch)))
        return np.concatenate(found)

    async def run(self, work: Callable[[], T]) -> T:
        """Run a function in the encoder's thread.

        Raises:
            QueueFullError: Too many requests wait.
        """
        with self._place():
            return await self._in_thread(work)

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._closed:
            raise EngineClosedError("the model is closed")
        if self.waiting > self._queue:
            raise QueueFullError("too many requests wait")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def close(self, *, finish: bool) -> None:
        """End the thread."""
        self._closed = True
        self._thread.shutdown(wait=finish, cancel_futures=not finish)

"""An open encoder bundle: embeddings, one batch after another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.encoder import EncoderSession
from rk_export.runtime.engine.records import EngineClosedError, QueueFullError

T = TypeVar("T")

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
        self._widths: dict[str, int] = {}
        self.waiting = 0

    async def embed(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Return one unit vector per row of tokens, float32 [rows, width]; a batch is never divided by others.

        Raises:
            InputError: A row is empty, too long or has an unknown token.
            QueueFullError: Too many requests wait.
        """
        if not rows:
            raise InputError("no texts were given", where="text", fix="give one or more")
        found = []
        with self._place():
            for start in range(0, len(rows), _BATCH):
                batch = rows[start : start + _BATCH]
                found.append(await self._in_thread(partial(self.session.embed_tokens, batch)))
        return np.concatenate(found)

    async def hidden(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the last hidden state of tokens, float32 [batch, length, hidden].

        Args:
            ids: [batch, length], int64.
            mask: The same, 0 at padding.

        Raises:
            InputError: A row is too long or has an unknown token.
            QueueFullError: Too many requests wait.
        """
        found = np.empty((*ids.shape, await self.hidden_width()), np.float32)
        with self._place():
            for start in range(0, len(ids), _BATCH):
                part = slice(start, start + _BATCH)
                found[part] = await self._in_thread(partial(self.session.forward, ids[part], mask[part]))
        return found

    async def width(self) -> int:
        """Return the elements of a vector.

        Raises:
            QueueFullError: Too many requests wait.
        """
        return await self._measured(self.session.sentence_vectors)

    async def hidden_width(self) -> int:
        """Return the elements of a hidden state, which dense modules may turn into fewer or more.

        Raises:
            QueueFullError: Too many requests wait.
        """
        return await self._measured(self.session.forward)

    async def _measured(self, run: Callable[[np.ndarray], np.ndarray]) -> int:
        """Return the last axis of what the graph answers to one token."""
        if run.__name__ not in self._widths:
            with self._place():
                one = await self._in_thread(partial(run, np.zeros((1, 1), np.int64)))
            self._widths[run.__name__] = one.shape[-1]
        return self._widths[run.__name__]

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

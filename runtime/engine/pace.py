"""How much of a prompt to compute at a time, so that running answers are not held up for long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rk_export.runtime.engine.rounding import GRAIN

_UNHURRIED = 512  # tokens, where nobody waits
_FIRST = 64  # tokens, until a step was timed
_STEPS = 3.0  # a chunk may take as long as so many steps of the running answers
_MEMORY = 0.8  # what one timing leaves of the average before it


class Pace:
    """Chooses the length of a prompt's chunk. It changes no answer: chunks are whole multiples of `GRAIN`.

    Args:
        chunk: Tokens of every chunk, about; None lets a chunk take as long as three steps, by their timings, and
            hurries nobody where no answer is running.
    """

    def __init__(self, chunk: int | None) -> None:
        self._fixed = chunk
        self._step: float | None = None  # seconds
        self._token: float | None = None  # seconds of a prompt's token

    def tokens(self, *, waiting: bool) -> int:
        """Return the tokens of the next chunk; ``waiting`` says whether answers are held up by it."""
        if self._fixed is not None:
            return _whole(self._fixed)
        if not waiting:
            return _UNHURRIED
        if self._step is None or self._token is None:
            return _FIRST
        return _whole(min(_UNHURRIED, _STEPS * self._step / self._token))

    @contextmanager
    def timed_step(self) -> Iterator[None]:
        """Time a step of the running answers."""
        begin = time.perf_counter()
        yield
        self._step = _average(self._step, time.perf_counter() - begin)

    @contextmanager
    def timed_chunk(self, tokens: int) -> Iterator[None]:
        """Time a chunk of so many tokens."""
        begin = time.perf_counter()
        yield
        self._token = _average(self._token, (time.perf_counter() - begin) / tokens)


def _whole(tokens: float) -> int:
    return max(int(tokens) // GRAIN, 1) * GRAIN


def _average(before: float | None, now: float) -> float:
    return now if before is None else _MEMORY * before + (1 - _MEMORY) * now

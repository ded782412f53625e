"""How far a long loop is. The library only says it; the program that runs it chooses how it is shown.

Without a program that shows bars, a stage is a line in the log when it starts, and more lines while it runs: at most
one in five seconds, and in a long stage one a minute. Each says how far it is and about how long the rest takes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds between two lines: a tenth of the time that the stage has taken, within these bounds.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 5.0, 60.0


class Bar(Protocol):
    """What shows one stage."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """So many more items are done; the note says how it goes, such as the loss of a step."""

    def close(self) -> None:
        """The stage ended, or failed."""


OpenBar = Callable[[str, int, int], Bar]  # title, number of items, how many of them are done already


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and show how many are done.

    Args:
        items: What the stage works on.
        title: What it does, such as ``rewriting layers``.
        total: How many items there are; None asks them.

    Raises:
        TypeError: If `total` is None and the items do not know how many they are.
    """
    if total is None:
        if not isinstance(items, Sized):
            raise TypeError(f"{title}: say how many items there are")
        total = len(items)
    with stage(title, total) as bar:
        for item in items:
            yield item
            bar.advance()


@contextmanager
def stage(title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a stage while the context lasts; what runs inside calls `advance` on the bar.

    Args:
        title: What the stage does.
        total: How many items it has.
        done: How many of them an earlier run did.
    """
    bar = _open_bar(title, total, done)
    try:
        yield bar
    finally:
        bar.close()


@contextmanager
def shown_by(open_bar: OpenBar) -> Iterator[None]:
    """Show stages in another way while the context lasts."""
    global _open_bar
    before, _open_bar = _open_bar, open_bar
    try:
        yield
    finally:
        _open_bar = before


class LogBar:
    """A stage as lines in the log, with the time that is left."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total, self._first, self._done = title, total, done, done
        self._begin = time.monotonic()
        self._due = self._begin + _SHORTEST_PAUSE
        went_on = f", {done} of them done before" if done else ""
        logger.info("%s: %d%s", title, total, went_on)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count, and log when it is time to."""
        self._done += count
        now = time.monotonic()
        if now < self._due or not self._first < self._done < self._total:
            return
        spent = now - self._begin
        # What an earlier run did took none of this run's time.
        left = spent / (self._done - self._first) * (self._total - self._done)
        news = [f"{self._done} of {self._total}", *([note] if note else []), f"about {_rounded(left)} left"]
        logger.info("%s: %s", self._title, ", ".join(news))
        self._due = now + min(max(0.1 * spent, _SHORTEST_PAUSE), _LONGEST_PAUSE)

    def close(self) -> None:
        """Nothing is left on the screen."""


def _rounded(seconds: float) -> str:
    """Return a time as exactly as an estimate deserves: 7 s, 40 s, 12 min, 2.5 h."""
    if seconds < 10:
        return f"{max(1, round(seconds))} s"
    if seconds < 90:
        return f"{5 * round(seconds / 5)} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


_open_bar: OpenBar = LogBar

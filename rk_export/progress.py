"""How far a long loop is. The library only says it; the program that runs it chooses how it is shown.

Without a program that shows bars, a stage is a line in the log when it starts, and one more at most every tenth of it
and every ten seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

_NEWS_SHARE = 0.1
_NEWS_SECONDS = 10.0


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
        self._begin = self._last = time.monotonic()
        self._next = done + _NEWS_SHARE * total
        logger.info("%s: %d", title, total)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count, and log where there is news."""
        self._done += count
        now = time.monotonic()
        if self._next <= self._done < self._total and now - self._last >= _NEWS_SECONDS:
            left = (now - self._begin) / (self._done - self._first) * (self._total - self._done)
            minutes, seconds = divmod(round(left), 60)
            news = [
                f"{self._done} of {self._total}",
                *([note] if note else []),
                f"{minutes}:{seconds:02d} left",
            ]
            logger.info("%s: %s", self._title, ", ".join(news))
            self._last, self._next = now, self._done + _NEWS_SHARE * self._total

    def close(self) -> None:
        """Nothing is left on the screen."""


_open_bar: OpenBar = LogBar

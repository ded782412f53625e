"""What callers hand to the engine's thread: requests with their listeners, and work of their own."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from rk_export.errors import RkExportError
from rk_export.runtime.engine.records import Answer, EngineClosedError, Piece
from rk_export.runtime.engine.running import Running

Event = Piece | Answer | RkExportError
Listener = Callable[[Event], None]
T = TypeVar("T")

logger = logging.getLogger(__name__)


class Ticket:
    """A request that was taken.

    Args:
        running: Its row.
        listener: Hears of every piece, and at last of the answer or of what went wrong.
        cancel: Asks the engine to take the request back.
    """

    def __init__(self, running: Running, listener: Listener, cancel: Callable[[Ticket], None]) -> None:
        self.running = running
        self._listener, self._cancel = listener, cancel
        self._told = 0  # tokens that the listener knows of

    def cancel(self) -> None:
        """Take the request back and free its slot; one that has ended stays as it is.

        The listener may still hear of a token that was under way, and at last of a `CancelledRequestError`.
        """
        self._cancel(self)

    def tell_tokens(self) -> int:
        """Tell the listener of the tokens since the last time; return their number."""
        row = self.running.row
        new = len(row.tokens) - self._told
        if new:
            told, self._told = self._told, len(row.tokens)
            self.tell(Piece(row.new_text(), tuple(row.tokens[told:]), tuple(row.scores[told:])))
        return new

    def tell(self, event: Event) -> None:
        """Tell the listener something; what goes wrong there is logged and hurts nobody else."""
        try:
            self._listener(event)
        except Exception:
            logger.exception("a listener of the engine failed")


class Work(Generic[T]):
    """Something that a coroutine wants to have done on the engine's thread.

    Args:
        call: What is done.
    """

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[T] = self._loop.create_future()

    def do(self) -> None:
        """Do it, unless nobody waits for it any more."""
        if self.result.cancelled():
            return
        try:
            value = self._call()
        except Exception as error:
            post(self._loop, self._settle, self.result.set_exception, error)
        else:
            post(self._loop, self._settle, self.result.set_result, value)

    def refuse(self, why: str) -> None:
        """Say that it will not be done."""
        error = EngineClosedError(why, where="engine")
        post(self._loop, self._settle, self.result.set_exception, error)

    def _settle(self, settle: Callable[[Any], None], value: Any) -> None:
        if not self.result.done():
            settle(value)


def post(loop: asyncio.AbstractEventLoop, call: Callable[..., object], *arguments: object) -> None:
    """Have an event loop call something soon; a loop that has ended waits for nothing any more."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:
        logger.debug("an event loop ended before its answer came")

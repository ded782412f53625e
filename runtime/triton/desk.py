"""Takes requests to the engine and brings their pieces back, in one thread beside the engine's.

The engine's thread only leaves events in a queue: what sending takes does not hold up the other answers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rk_export.errors import RkExportError
from rk_export.runtime.engine.records import Answer, Piece, Request
from rk_export.runtime.triton.ask import Ask
from rk_export.runtime.triton.refusal import CANCELLED, Refusal, logger

if TYPE_CHECKING:
    from rk_export.runtime.engine.engine import Engine
    from rk_export.runtime.engine.tickets import Ticket

_LOOK = 0.05  # seconds between two looks for clients that left


class Wire(Protocol):
    """The way back to one client; used by one thread at a time."""

    def piece(self, text: str) -> None:
        """Send a part of the answer."""

    def answer(self, text: str, answer: Answer) -> None:
        """Send the last part of the answer and how it ended."""

    def refuse(self, refusal: Refusal) -> None:
        """End without an answer."""

    def cancelled(self) -> bool:
        """Whether the client left."""


@dataclass(eq=False)
class Exchange:
    """A request on its way.

    Args:
        wire: The way back.
        stream: Whether pieces are sent.
        sent: The text that was sent.
        ticket: With which it is cancelled; None until the engine gave it.
        over: Whether it ended; what the engine still says of it is ignored.
    """

    wire: Wire
    stream: bool
    sent: str = ""
    ticket: Ticket | None = None
    over: bool = False


_Event = Piece | Answer | RkExportError | None  # None: the engine took the request


class Desk:
    """Where requests come in; several threads may use it.

    Args:
        engine: It is closed together with the desk.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._events: queue.SimpleQueue[tuple[Exchange, _Event] | None] = queue.SimpleQueue()
        self._open: set[Exchange] = set()
        self._thread = threading.Thread(target=self._work, name="rk-export-triton", daemon=True)
        self._thread.start()

    def take(self, tensors: Mapping[str, np.ndarray], parameters: Iterable[str], wire: Wire) -> None:
        """Begin a request; whatever is wrong with it goes to the client.

        Args:
            tensors: Its tensors by name.
            parameters: Names of what it brings beside them.
            wire: The way back.
        """
        try:
            ask = Ask.read(tensors, parameters)
            exchange = Exchange(wire, ask.stream)
            request = Request(ask.tokens(self._engine.session), ask.options)
            exchange.ticket = self._engine.submit(request, lambda event: self._events.put((exchange, event)))
        except Exception as error:  # none may end the server's loop
            wire.refuse(Refusal.of(error))
        else:
            self._events.put((exchange, None))

    def close(self) -> None:
        """Cancel what runs, tell its clients, and end."""
        self._engine.close(finish=False)
        self._events.put(None)
        self._thread.join()

    def _work(self) -> None:
        looked = time.monotonic()
        while True:
            try:
                found = self._events.get(timeout=_LOOK if self._open else None)
                if found is None:
                    return
                with self._guarded(found[0]):
                    self._handle(*found)
            except queue.Empty:
                pass
            if time.monotonic() - looked >= _LOOK:
                self._look()
                looked = time.monotonic()

    def _look(self) -> None:
        for exchange in list(self._open):
            with self._guarded(exchange):
                if exchange.wire.cancelled():
                    self._drop(exchange)
                    exchange.wire.refuse(CANCELLED)

    def _drop(self, exchange: Exchange) -> None:
        exchange.over = True
        self._open.discard(exchange)
        if exchange.ticket is not None:
            exchange.ticket.cancel()

    @contextmanager
    def _guarded(self, exchange: Exchange) -> Iterator[None]:
        """Let a broken wire take its own request along, and not the others."""
        try:
            yield
        except Exception:
            logger.exception("a response could not be sent")
            self._drop(exchange)

    def _handle(self, exchange: Exchange, event: _Event) -> None:
        if exchange.over:
            return
        if event is None:
            self._open.add(exchange)
        elif isinstance(event, Piece):
            if event.text and exchange.stream:
                exchange.wire.piece(event.text)
                exchange.sent += event.text
        else:
            exchange.over = True
            self._open.discard(exchange)
            _end(exchange, event)


def _end(exchange: Exchange, event: Answer | RkExportError) -> None:
    if isinstance(event, Answer):
        exchange.wire.answer(event.text.removeprefix(exchange.sent), event)
    else:
        exchange.wire.refuse(Refusal.of(event))

"""The engine: a thread that owns the batch, and the faces that callers talk to, plain and asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from rk_export.errors import RkExportError
from rk_export.runtime.engine.open_batch import open_batch
from rk_export.runtime.engine.records import (
    Answer,
    CancelledRequestError,
    Counters,
    EngineClosedError,
    EngineOptions,
    Piece,
    QueueFullError,
    Request,
)
from rk_export.runtime.engine.running import Running
from rk_export.runtime.session import Session

Event = Piece | Answer | RkExportError
Listener = Callable[[Event], None]
T = TypeVar("T")

logger = logging.getLogger(__name__)

_DEFAULTS = EngineOptions()


class Ticket:
    """A request that was taken."""

    def __init__(self, running: Running, listener: Listener, cancel: Callable[[Ticket], None]) -> None:
        self.running, self.listener = running, listener
        self.told = 0  # tokens that the listener knows of
        self._cancel = cancel

    def cancel(self) -> None:
        """Take the request back and free its slot; one that has ended stays as it is.

        The listener may still hear of a token that was under way, and at last of a `CancelledRequestError`.
        """
        self._cancel(self)


class Engine:
    """Answers many requests at once, each exactly as it would be answered alone.

    One thread owns the buffers and runs the graph. All methods may be called from any thread. Close the engine, or
    use it as a context manager.

    Args:
        session: The open bundle; nobody else should run it meanwhile, for the processor's sake.
        options: How many requests run together, and in which memory.
        draft: A smaller model of the same vocabulary that guesses ahead. Requests then run one at a time.

    Raises:
        InputError: The capacity is beyond the model's context, or the draft cannot guess for this model.
    """

    def __init__(
        self, session: Session, options: EngineOptions = _DEFAULTS, draft: Session | None = None
    ) -> None:
        self.session, self.options = session, options
        self._batch, self.capacity = open_batch(session, options, draft)
        self._waiting: deque[Ticket] = deque()
        self._running: dict[Running, Ticket] = {}
        self._left: list[Ticket] = []  # cancelled while they ran
        self._work: deque[Callable[[], None]] = deque()
        self._counters, self._finished = Counters(), Counter[str]()
        self._state = threading.Condition()
        self._closing = self._at_once = False
        self._thread = threading.Thread(target=self._serve, name="rk-export engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(finish=exception[0] is None)

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Take a request.

        Args:
            request: The prompt, and how to continue it.
            listener: Called on the engine's thread with every `Piece`, and at last with the `Answer` or with what went
                wrong. It must be quick and must not raise.

        Raises:
            InputError: The prompt is empty, has a token without a row in the embedding, or leaves no room.
            QueueFullError: As many requests wait as may.
            EngineClosedError: The engine is being closed.
        """
        row = self.session.row(
            request.prompt,
            request.options,
            index=request.sample,
            length=self.capacity,
            constraint=request.constraint,
        )
        ticket = Ticket(Running(row), listener, self._cancel)
        with self._state:
            if self._closing:
                raise EngineClosedError("the engine takes no requests any more", where="engine")
            if len(self._waiting) >= self.options.queue + self.options.slots - len(self._running):
                self._counters = replace(self._counters, refused=self._counters.refused + 1)
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already", where="engine", fix="try again later"
                )
            self._counters = replace(
                self._counters,
                requests=self._counters.requests + 1,
                prompt_tokens=self._counters.prompt_tokens + len(request.prompt),
            )
            self._waiting.append(ticket)
            self._state.notify_all()
        return ticket

    def generate(self, requests: Iterable[Request]) -> list[Answer]:
        """Answer requests and wait for all of them; the answers are in their order.

        Raises:
            RkExportError: A request was refused or failed; the others are cancelled.
        """
        requests = list(requests)
        ended = [threading.Event() for _ in requests]
        found: list[Event | None] = [None] * len(requests)

        def listen(index: int, event: Event) -> None:
            if not isinstance(event, Piece):
                found[index] = event
                ended[index].set()

        tickets: list[Ticket] = []
        try:
            for index, request in enumerate(requests):
                tickets.append(self.submit(request, lambda event, index=index: listen(index, event)))  # type: ignore[misc]
            for event in ended:
                event.wait()
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return [_answered(event) for event in found]

    async def stream(self, request: Request) -> AsyncGenerator[Piece | Answer, None]:
        """Answer a request piece by piece; the last item is the whole answer.

        Closing the generator, or cancelling the task that reads it, takes the request back.

        Raises:
            RkExportError: As `submit`, or the request failed.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listen(event: Event) -> None:
            # The loop may have been closed by somebody who did not wait for the answer.
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        ticket = self.submit(request, listen)
        try:
            while True:
                event = await events.get()
                if isinstance(event, RkExportError):
                    raise event
                yield event
                if isinstance(event, Answer):
                    return
        finally:
            ticket.cancel()

    async def answer(self, request: Request) -> Answer:
        """Answer a request; cancelling the task takes it back.

        Raises:
            RkExportError: As `submit`, or the request failed.
        """
        async with aclosing(self.stream(request)) as events:
            async for event in events:
                if isinstance(event, Answer):
                    return event
        raise AssertionError("a stream ends with an answer")

    async def run(self, work: Callable[[], T]) -> T:
        """Run something on the engine's thread, between two steps, and return what it returns.

        Raises:
            EngineClosedError: The engine is closed.
            Exception: What the work raises.
        """
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()

        def settle(set_it: Callable[[], None]) -> None:
            if not result.done():
                set_it()

        def worked() -> None:
            try:
                value = work()
            except BaseException as error:
                problem = error
                loop.call_soon_threadsafe(settle, lambda: result.set_exception(problem))
            else:
                loop.call_soon_threadsafe(settle, lambda: result.set_result(value))

        with self._state:
            if self._closing:
                raise EngineClosedError("the engine takes no work any more", where="engine")
            self._work.append(worked)
            self._state.notify_all()
        return await result

    @property
    def alive(self) -> bool:
        """Whether the thread runs: it ends when the engine is closed, or where a fault ended it."""
        return self._thread.is_alive()

    def counters(self) -> Counters:
        """Return what was done so far."""
        with self._state:
            return replace(
                self._counters,
                running=len(self._running),
                waiting=len(self._waiting),
                finished=dict(self._finished),
            )

    def close(self, *, finish: bool = True, timeout: float | None = None) -> None:
        """Take no more requests, and end the thread.

        Args:
            finish: Whether running and waiting requests are answered first; else they end with `EngineClosedError`.
            timeout: Seconds until those that are still running end so all the same; None waits for them.
        """
        with self._state:
            self._closing = True
            self._at_once |= not finish
            self._state.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.close(finish=False)

    def _cancel(self, ticket: Ticket) -> None:
        with self._state:
            self._left.append(ticket)
            self._state.notify_all()

    def _serve(self) -> None:
        try:
            while self._admitted():
                advanced = self._batch.step()
                self._counters = replace(self._counters, steps=self._counters.steps + bool(advanced))
                for running in advanced:
                    self._tell(running)
        except BaseException as error:
            logger.exception("the engine ended")
            self._end_all(f"the engine ended: {type(error).__name__}")
        else:
            self._end_all("the engine was closed")

    def _admitted(self) -> bool:
        """Wait for something to do, and take requests in; return whether there is more to come."""
        with self._state:
            self._state.wait_for(
                lambda: self._waiting or self._running or self._work or self._left or self._closing
            )
            if self._at_once or (self._closing and not (self._waiting or self._running or self._work)):
                return False
            gone = self._let_go()
            while self._waiting and self._batch.has_room:
                ticket = self._waiting.popleft()
                self._running[ticket.running] = ticket
                self._batch.add(ticket.running)
                self._count(cached_tokens=ticket.running.cached)
            work = [self._work.popleft() for _ in range(len(self._work))]
        for ticket in gone:
            ticket.listener(CancelledRequestError("the request was taken back", where="engine"))
        for item in work:
            item()
        return True

    def _let_go(self) -> list[Ticket]:
        """Forget the cancelled requests that have not ended, and return them."""
        gone = []
        for ticket in self._left:
            if self._running.pop(ticket.running, None) is not None:
                self._batch.drop(ticket.running)
                gone.append(ticket)
            elif ticket in self._waiting:
                self._waiting.remove(ticket)
                gone.append(ticket)
        self._finished["cancelled"] += len(gone)
        self._left.clear()
        return gone

    def _tell(self, running: Running) -> None:
        """Tell what is new of a row."""
        with self._state:
            ticket = self._running[running]
            new = len(running.row.tokens) - ticket.told
            self._count(new_tokens=new)
            if running.ended:
                del self._running[running]
                self._count(drafted_tokens=running.drafted, accepted_tokens=running.accepted)
                self._finished["failed" if running.failure else str(running.row.finish_reason)] += 1
        if new:
            ticket.listener(_piece(running, ticket.told))
            ticket.told += new
        if running.ended:
            ticket.listener(running.failure or running.answer())

    def _end_all(self, why: str) -> None:
        with self._state:
            self._closing = True
            tickets = [*self._running.values(), *self._waiting]
            self._finished["cancelled"] += len(tickets)
            self._running.clear()
            self._waiting.clear()
            work, self._work = list(self._work), deque()
        for ticket in tickets:
            ticket.listener(EngineClosedError(why, where="engine"))
        for item in work:
            item()

    def _count(self, **more: int) -> None:
        added = {name: getattr(self._counters, name) + count for name, count in more.items()}
        self._counters = replace(self._counters, **added)


def _piece(running: Running, told: int) -> Piece:
    row = running.row
    return Piece(row.new_text(), tuple(row.tokens[told:]), tuple(row.scores[told:]))


def _answered(event: Event | None) -> Answer:
    if isinstance(event, RkExportError):
        raise event
    assert isinstance(event, Answer)
    return event

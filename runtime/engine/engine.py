"""The engine: a thread that owns the batch, and the faces that callers talk to, plain and asyncio."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from rk_export.errors import RkExportError
from rk_export.runtime.engine.open_batch import open_batch
from rk_export.runtime.engine.records import (
    Answer,
    CancelledRequestError,
    Counters,
    EngineClosedError,
    EngineFaultError,
    EngineOptions,
    Piece,
    QueueFullError,
    Request,
)
from rk_export.runtime.engine.running import Running
from rk_export.runtime.engine.tickets import Event, Listener, Ticket, Work, post
from rk_export.runtime.session import Session

T = TypeVar("T")

logger = logging.getLogger(__name__)

_DEFAULTS = EngineOptions()
_MOST_FAULTS = 3  # steps in a row that fail: the engine then ends, and whoever watches it starts another


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
        self._left: list[Ticket] = []  # taken back by their callers
        self._work: deque[Work[Any]] = deque()
        self._counters, self._finished = Counters(), Counter[str]()
        self._state = threading.Condition()
        self._closing = self._at_once = False
        self._thread = threading.Thread(target=self._serve, name="rk-export engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(finish=exception[0] is None)

    @property
    def slots(self) -> int:
        """Requests that surely run together: fewer than the options say where requests run one at a time."""
        return self._batch.slots

    @property
    def alive(self) -> bool:
        """Whether the thread runs: it ends when the engine is closed, or after several faults in a row."""
        return self._thread.is_alive()

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Take a request.

        Args:
            request: The prompt, and how to continue it.
            listener: Called on the engine's thread with every `Piece`, and at last with the `Answer` or with what went
                wrong. It must be quick.

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
            self._require_open()
            free = max(0, self._batch.slots - len(self._running))
            if len(self._waiting) - free >= self.options.queue:
                self._count(refused=1)
                raise QueueFullError(
                    f"{len(self._waiting)} requests wait already", where="engine", fix="try again later"
                )
            self._count(requests=1, prompt_tokens=len(request.prompt))
            self._waiting.append(ticket)
            self._state.notify_all()
        return ticket

    def generate(self, requests: Iterable[Request]) -> list[Answer]:
        """Answer requests and wait for all of them; the answers are in their order.

        Raises:
            RkExportError: A request was refused or failed; the others are cancelled.
        """
        ended: SimpleQueue[tuple[int, Event]] = SimpleQueue()

        def listen(index: int, event: Event) -> None:
            if not isinstance(event, Piece):
                ended.put((index, event))

        tickets: list[Ticket] = []
        answers: dict[int, Answer] = {}
        try:
            for index, request in enumerate(requests):
                tickets.append(self.submit(request, partial(listen, index)))
            while len(answers) < len(tickets):
                index, event = ended.get()
                if isinstance(event, RkExportError):
                    raise event
                if isinstance(event, Answer):
                    answers[index] = event
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return [answers[index] for index in range(len(tickets))]

    async def stream(self, request: Request) -> AsyncGenerator[Piece | Answer, None]:
        """Answer a request piece by piece; the last item is the whole answer.

        Closing the generator, or cancelling the task that reads it, takes the request back.

        Raises:
            RkExportError: As `submit`, or the request failed.
        """
        events = asyncio.Queue[Event]()
        ticket = self.submit(request, partial(post, asyncio.get_running_loop(), events.put_nowait))
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

        Cancelling the task takes it back, unless it has begun.

        Raises:
            QueueFullError: As much work waits as requests may.
            EngineClosedError: The engine is closed.
            Exception: What the work raises.
        """
        asked = Work(work)
        with self._state:
            self._require_open()
            if len(self._work) > self.options.queue:
                raise QueueFullError(
                    f"{len(self._work)} calls wait already", where="engine", fix="try again later"
                )
            self._work.append(asked)
            self._state.notify_all()
        return await asked.result

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

    def _require_open(self) -> None:
        if self._closing:
            raise EngineClosedError("the engine takes no requests any more", where="engine")

    def _cancel(self, ticket: Ticket) -> None:
        with self._state:
            self._left.append(ticket)
            self._state.notify_all()

    def _serve(self) -> None:
        why = "the engine ended after a fault"
        try:
            faults = 0
            while faults < _MOST_FAULTS and self._has_work():
                try:
                    if self._take_turn():
                        faults = 0
                except Exception as error:
                    logger.exception("a step of the engine failed")
                    faults += 1
                    self._fail_running(error)
            if faults < _MOST_FAULTS:
                why = "the engine was closed"
        finally:
            self._end_all(why)

    def _has_work(self) -> bool:
        """Wait for something to do; return False where the engine is to end."""
        with self._state:
            self._state.wait_for(
                lambda: self._waiting or self._running or self._work or self._left or self._closing
            )
            return not self._at_once and bool(
                self._waiting or self._running or self._work or self._left or not self._closing
            )

    def _take_turn(self) -> bool:
        """Let requests go and come, do a piece of the callers' work, and give every running row a token.

        Returns:
            Whether the graph ran for a row.
        """
        with self._state:
            gone = self._let_go()
            work = self._work.popleft() if self._work else None
        for ticket in gone:
            ticket.tell(CancelledRequestError("the request was taken back", where="engine"))
        if work is not None:
            work.do()
        while (ticket_in := self._next()) is not None:
            self._batch.add(ticket_in.running)
            with self._state:
                self._count(cached_tokens=ticket_in.running.cached)
        ran = self._batch.running > 0
        advanced = self._batch.step()
        with self._state:
            self._count(steps=int(bool(advanced)))
        for running in advanced:
            self._tell(running)
        return ran

    def _next(self) -> Ticket | None:
        """Return the next waiting request where there is room for it; it counts as running from now on."""
        with self._state:
            if not self._waiting or not self._batch.has_room:
                return None
            ticket = self._waiting.popleft()
            self._running[ticket.running] = ticket
            return ticket

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
        ticket = self._running[running]
        new = ticket.tell_tokens()
        with self._state:
            self._count(new_tokens=new)
            if running.ended:
                del self._running[running]
                self._count(drafted_tokens=running.drafted, accepted_tokens=running.accepted)
                self._finished["failed" if running.failure else str(running.row.finish_reason)] += 1
        if running.ended:
            ticket.tell(running.failure or running.answer())

    def _fail_running(self, error: Exception) -> None:
        """End the requests that a failed step may have left half done; those that wait go on."""
        failure = error if isinstance(error, RkExportError) else None
        with self._state:
            tickets = list(self._running.values())
            self._running.clear()
            self._finished["failed"] += len(tickets)
        for ticket in tickets:
            self._batch.drop(ticket.running)
            what = f"the engine failed in a step: {type(error).__name__}"
            ticket.tell(failure or EngineFaultError(what, where="engine", fix="see the log"))

    def _end_all(self, why: str) -> None:
        with self._state:
            self._closing = True
            tickets = [*self._running.values(), *self._waiting]
            self._finished["cancelled"] += len(tickets)
            self._running.clear()
            self._waiting.clear()
            work, self._work = list(self._work), deque()
        for ticket in tickets:
            ticket.tell(EngineClosedError(why, where="engine"))
        for item in work:
            item.refuse(why)

    def _count(self, **more: int) -> None:
        """Add to counters; the lock must be held."""
        added = {name: getattr(self._counters, name) + count for name, count in more.items()}
        self._counters = replace(self._counters, **added)

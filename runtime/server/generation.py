"""From a parsed request to the engine and back: several answers at once, in the order in which pieces come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request as HttpRequest

from rk_export.errors import RkExportError
from rk_export.runtime.engine.records import (
    Answer,
    EngineClosedError,
    Piece,
    QueueFullError,
    Request,
)
from rk_export.runtime.options import FinishReason
from rk_export.runtime.server.errors import bad_request, timed_out
from rk_export.runtime.server.json_schema import SchemaTooComplexError
from rk_export.runtime.server.logs import event
from rk_export.runtime.server.metrics import Metrics
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.settings import ServerSettings

T = TypeVar("T")
Event = Piece | Answer | RkExportError
FINISH = {FinishReason.EOS: "stop", FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class ClientGoneError(Exception):
    """The client closed its connection: nobody waits for the answer."""


class EngineFaultError(Exception):
    """The engine could not finish an answer that it had begun."""


@dataclass(frozen=True)
class Watch:
    """What is measured and bounded of one request.

    Args:
        model: Name for the figures.
        metrics: Where they go.
        begin: When the request came, by the event loop's clock.
        seconds: How long it may take.
    """

    model: str
    metrics: Metrics
    begin: float
    seconds: float

    @classmethod
    def start(cls, model: str, metrics: Metrics, settings: ServerSettings) -> Watch:
        """Return the watch of a request that comes now."""
        return cls(model, metrics, asyncio.get_running_loop().time(), settings.timeout)


class Answers:
    """The pieces of some answers as the engine gives them.

    Args:
        count: Answers.
        watch: Of the request.
    """

    def __init__(self, count: int, watch: Watch) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._open, self._watch = set(range(count)), watch
        self._last: list[float | None] = [None] * count

    def put(self, index: int, event: Event) -> None:
        """Take what an engine's thread brings."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))
        except RuntimeError:  # the loop has ended: nobody waits any more
            return

    async def events(self) -> AsyncIterator[tuple[int, Piece | Answer]]:
        """Yield every piece and every answer with its number.

        Raises:
            ApiError: The time is up, or the schema of the answer is too complex to follow.
            EngineClosedError: The engine ended first.
            EngineFaultError: The engine failed.
        """
        while self._open:
            index, found = await self._next()
            if isinstance(found, (EngineClosedError, QueueFullError)):
                raise found
            if isinstance(found, SchemaTooComplexError):
                raise bad_request(found.what, found.where, "invalid_schema") from found
            if isinstance(found, RkExportError):
                raise EngineFaultError(str(found)) from found
            if isinstance(found, Answer):
                self._open.discard(index)
                self._log(found)
            elif found.token_ids:
                self._measure(index, len(found.token_ids))
            yield index, found

    async def all(self) -> list[Answer]:
        """Return the answers in order.

        Raises:
            ApiError: As `events`.
        """
        found = {index: one async for index, one in self.events() if isinstance(one, Answer)}
        return [found[index] for index in sorted(found)]

    async def _next(self) -> tuple[int, Event]:
        try:
            async with asyncio.timeout_at(self._watch.begin + self._watch.seconds):
                return await self._events.get()
        except TimeoutError as error:
            raise timed_out(self._watch.seconds) from error

    def _log(self, answer: Answer) -> None:
        event(
            "answer",
            model=self._watch.model,
            prompt_tokens=answer.prompt_tokens,
            cached_tokens=answer.cached_tokens,
            new_tokens=len(answer.token_ids),
            reason=str(answer.finish_reason),
        )

    def _measure(self, index: int, tokens: int) -> None:
        now, last = self._loop.time(), self._last[index]
        watch, self._last[index] = self._watch, now
        if last is None:
            watch.metrics.first.labels(watch.model).observe(now - watch.begin)
        else:
            watch.metrics.between.labels(watch.model).observe((now - last) / tokens)


@contextmanager
def submitted(decoder: Decoder, requests: Sequence[Request], watch: Watch) -> Iterator[Answers]:
    """Give requests to an engine, all or none of them; those that have not ended are cancelled in the end.

    Raises:
        InputError: One is refused.
        QueueFullError: There is no room for all of them.
    """
    answers, tickets = Answers(len(requests), watch), []
    try:
        for index, request in enumerate(requests):
            tickets.append(decoder.engine.submit(request, partial(answers.put, index)))
        yield answers
    finally:
        for ticket in tickets:
            ticket.cancel()


def room_for(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    wanted: int | None,
    settings: ServerSettings,
    *,
    field: str = "prompt",
) -> int:
    """Return the new tokens that every answer may have.

    Args:
        decoder: The model.
        prompts: Tokens of each prompt.
        wanted: The tokens that the client names, or None for as many as fit.
        settings: They may limit an answer.
        field: The field that holds the prompts.

    Raises:
        ApiError: A prompt is empty or leaves no room, or more tokens are wanted than fit or are allowed.
    """
    longest = max(map(len, prompts), default=0)
    if min(map(len, prompts), default=0) == 0:
        raise bad_request("a prompt has no tokens", field)
    room = decoder.limit - longest
    most = room if settings.max_tokens is None else min(room, settings.max_tokens)
    if room < 1 or (wanted is not None and wanted > room):
        asked = f" and {wanted} new ones" if wanted is not None else ""
        raise bad_request(
            f"{longest} tokens of prompt{asked} do not fit into a context of {decoder.limit}",
            field if wanted is None else "max_tokens",
            "context_length_exceeded",
        )
    if wanted is not None and wanted > most:
        raise bad_request(f"max_tokens is {wanted}, this server allows {most}", "max_tokens")
    return most if wanted is None else wanted


def check_count(count: int, decoder: Decoder, settings: ServerSettings) -> None:
    """Refuse more answers in one request than can ever wait together.

    Raises:
        ApiError: There are more.
    """
    most = decoder.engine.slots + settings.engine.queue
    if count > most:
        raise bad_request(f"{count} answers in one request, at most {most} are given", "n")


def usage(answers: Sequence[Answer], samples: int) -> dict[str, Any]:
    """Return what answers took; the prompt of several answers counts once.

    Args:
        answers: In order; those to one prompt stand together.
        samples: Answers to one prompt.
    """
    prompts = answers[::samples]
    prompt = sum(answer.prompt_tokens for answer in prompts)
    new = sum(len(answer.token_ids) for answer in answers)
    found: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(answer.cached_tokens for answer in prompts)},
    }
    if drafted := sum(answer.drafted_tokens for answer in answers):
        accepted = sum(answer.accepted_tokens for answer in answers)
        found["completion_tokens_details"] = {
            "accepted_prediction_tokens": accepted,
            "rejected_prediction_tokens": drafted - accepted,
        }
    return found


async def prepared(request: HttpRequest, watch: Watch, work: Callable[[], T]) -> T:
    """Return what some work gives that must be done before the engine is asked; a thread does it.

    A thread cannot be stopped: it may go on for a while after the time is up or the client has left.

    Raises:
        ApiError: The time is up.
        ClientGoneError: The client left first.
    """
    try:
        async with asyncio.timeout_at(watch.begin + watch.seconds):
            return await unless_gone(request, asyncio.to_thread(work))
    except TimeoutError as error:
        raise timed_out(watch.seconds) from error


async def unless_gone(request: HttpRequest, work: Awaitable[T]) -> T:
    """Return what some work gives; it is cancelled when the client leaves.

    Raises:
        ClientGoneError: The client left first.
    """
    worker = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({worker, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientGoneError
    finally:
        for task in (worker, leaving):
            task.cancel()
        await asyncio.gather(worker, leaving, return_exceptions=True)


async def _left(request: HttpRequest) -> None:
    """Return when the client closes its connection; the body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def now() -> int:
    """Return the time as OpenAI's answers tell it."""
    return int(time.time())

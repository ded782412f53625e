"""Bundles behind Ray Serve, with OpenAI's routes: a copy of this folder is a server for a cluster.

    pip install 'ray[serve]' rk-export
    cd samples && serve run ray_serve.app:application small=/models/small large=/models/large

Every name in the command becomes a model of ``/v1/completions`` and ``/v1/chat/completions``. Its folder must lie
under the same path on every node.

One deployment a bundle, rather than ``serve.multiplexed``: each model scales by its own load, and its replicas hold
it from their start. A multiplexed replica loads and drops bundles while requests run, so that one model's load slows
another's answers, and a crash loses the answers of both.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from ray_serve.forms import Ask, Refusal, Reply, event
from ray_serve.repeat import LostAnswerError, Repeated
from rk_export.errors import InputError
from rk_export.runtime import Session
from rk_export.runtime.engine import (
    Answer,
    Counters,
    Engine,
    EngineClosedError,
    EngineOptions,
    QueueFullError,
    Request,
)

Event = str | Answer | Refusal  # a piece of text; the finished answer; why there is none

# What a caller sees of a replica whose process, node or engine has ended.
LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    ReplicaUnavailableError,
    EngineClosedError,
)
DRAIN = 120  # seconds in which a replica that has to end finishes its answers; it takes no new ones
ATTEMPTS = "x-attempts"  # a response header: how many replicas the request was sent to

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """One bundle and its replicas.

    Args:
        bundle: The folder, the same on every node.
        replicas: How many, by the requests that run or wait. Ray adds some while there are more than
            ``target_ongoing_requests`` a replica.
        slots: Requests that one replica decodes together.
        threads: Threads and declared CPUs of a replica.
        waiting: Requests that may wait at an ingress for a free slot; more are refused with status 429.
    """

    bundle: str
    replicas: AutoscalingConfig = field(
        default_factory=lambda: AutoscalingConfig(min_replicas=1, max_replicas=4, target_ongoing_requests=6)
    )
    slots: int = 8
    threads: int = 1
    waiting: int = 64


@serve.deployment(graceful_shutdown_timeout_s=DRAIN, health_check_period_s=5)
class Replica:
    """A process with one open bundle and its engine."""

    def __init__(self, bundle: str, slots: int, threads: int) -> None:
        session = Session.from_pretrained(bundle, threads=threads)
        # Ray holds the queue: a request that waits there can still go to any replica.
        self.engine = Engine(session, EngineOptions(slots=slots, queue=slots))

    async def answer(self, ask: Ask) -> AsyncGenerator[Event, None]:
        """Yield the pieces of a streamed answer, if it is one, and the whole at the end."""
        try:
            request = Request(self._tokens(ask), ask.options)
            if not ask.stream:
                yield await self.engine.answer(request)
                return
            async with aclosing(self.engine.stream(request)) as items:
                async for item in items:
                    if isinstance(item, Answer):
                        yield item
                    elif item.text:
                        yield item.text
        except QueueFullError:
            yield Refusal(429, "too many requests: try again later", "queue_full", retry_after=1)
        except InputError as error:
            yield Refusal.of(error)

    def counters(self) -> Counters:
        """Return what the engine of this replica did, for your own metrics."""
        return self.engine.counters()

    def _tokens(self, ask: Ask) -> tuple[int, ...]:
        session = self.engine.session
        if ask.messages is not None:
            return tuple(session.chat_tokens(ask.messages))
        return tuple(
            session.text_codec.encode(ask.prompt) if isinstance(ask.prompt, str) else ask.prompt or ()
        )

    def __del__(self) -> None:
        """Stop the engine; Ray calls this when the last answer is finished."""
        if hasattr(self, "engine"):
            self.engine.close()


@serve.deployment(
    max_ongoing_requests=1000, graceful_shutdown_timeout_s=DRAIN, ray_actor_options={"num_cpus": 0}
)
class Ingress:
    """Takes HTTP requests, sends each to a replica of its model, and repeats those whose replica dies."""

    def __init__(self, models: Mapping[str, DeploymentHandle]) -> None:
        self._models = {name: handle.options(stream=True) for name, handle in models.items()}

    async def __call__(self, request: HttpRequest) -> Response:
        """Answer a request."""
        match request.method, request.url.path:
            case "POST", "/v1/completions":
                return await self._answer(request, chat=False)
            case "POST", "/v1/chat/completions":
                return await self._answer(request, chat=True)
            case "GET", "/v1/models":
                listed = [
                    {"id": name, "object": "model", "created": 0, "owned_by": "rk-export"}
                    for name in self._models
                ]
                return JSONResponse({"object": "list", "data": listed})
        return refused(Refusal(404, "there is no such route", "not_found"))

    async def _answer(self, request: HttpRequest, *, chat: bool) -> Response:
        try:
            ask = Ask.of(await _json(request), chat=chat)
        except InputError as error:
            return refused(Refusal.of(error, error.where))
        if ask.model not in self._models:
            return refused(Refusal(404, f"there is no model {ask.model!r}", "model_not_found", "model"))
        tries = Repeated(lambda: _attempt(self._models[ask.model], ask), LOST)
        events = tries.events()
        try:
            # The status is chosen when the first event is here: until then, a loss costs the client only time.
            first = await anext(events)
        except Exception as error:
            return refused(explained(error))
        attempts = {ATTEMPTS: str(tries.made)}
        if isinstance(first, Refusal):
            return refused(first)
        if isinstance(first, Answer) and not ask.stream:
            return JSONResponse(Reply(ask).whole(first), headers=attempts)
        stream = _sent(Reply(ask), first, events)
        return StreamingResponse(stream, media_type="text/event-stream", headers=attempts)


async def _json(request: HttpRequest) -> Any:
    try:
        return json.loads(await request.body())
    except ValueError as error:
        raise InputError("is no JSON", where="body", fix="send a JSON object") from error


async def _attempt(replicas: DeploymentHandle, ask: Ask) -> AsyncGenerator[Event, None]:
    """Send the request to one replica."""
    response = replicas.answer.remote(ask)
    try:
        async for item in response:
            yield item
    finally:
        response.cancel()  # nothing where it has ended; frees the slot where the client has left


async def _sent(reply: Reply, first: Event, rest: AsyncGenerator[Event, None]) -> AsyncGenerator[str, None]:
    """Write a stream as server-sent events. One that breaks off ends with an error, and without ``[DONE]``."""
    async with aclosing(rest):
        try:
            yield _written(reply, first, first=True)
            async for item in rest:
                yield _written(reply, item, first=False)
        except Exception as error:
            yield event(explained(error).body())


def _written(reply: Reply, item: Event, *, first: bool) -> str:
    if isinstance(item, Refusal):
        return event(item.body())
    return reply.end(item) if isinstance(item, Answer) else reply.piece(item, first=first)


def explained(error: Exception) -> Refusal:
    """Say to the client what has happened, and nothing of the inside."""
    if isinstance(error, LostAnswerError):
        return Refusal(503, f"{error.what}: {error.fix}", "replica_lost", retry_after=1)
    if isinstance(error, BackPressureError):
        return Refusal(429, "too many requests: try again later", "queue_full", retry_after=1)
    logger.error("a request failed", exc_info=error)
    return Refusal(500, "an internal error", "internal_error")


def refused(refusal: Refusal) -> Response:
    """Return the response of a refusal."""
    wait = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    return JSONResponse(refusal.body(), refusal.status, headers=wait)


def build(models: Mapping[str, Model]) -> Application:
    """Return the application for ``serve.run``."""
    replicas = {
        name: Replica.options(
            name=f"model-{re.sub(r'[^A-Za-z0-9.-]', '-', name)}",
            autoscaling_config=model.replicas,
            max_ongoing_requests=model.slots,
            max_queued_requests=model.waiting,
            ray_actor_options={"num_cpus": model.threads},
        ).bind(model.bundle, model.slots, model.threads)
        for name, model in models.items()
    }
    return Ingress.bind(replicas)


def application(bundles: dict[str, str]) -> Application:
    """Build the application of a command line: ``serve run ray_serve.app:application NAME=FOLDER ...``.

    Raises:
        InputError: No bundle is given.
    """
    if not bundles:
        raise InputError("no bundle", where="serve run", fix="give NAME=FOLDER, once for each model")
    return build({name: Model(folder) for name, folder in bundles.items()})

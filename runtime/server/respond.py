"""From a request's body to its response, whole or streamed: what chats and text completions have in common."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rk_export.runtime.engine.records import Answer, Request
from rk_export.runtime.server.context import context_of
from rk_export.runtime.server.errors import JsonResponse
from rk_export.runtime.server.generation import Answers, Watch, prepared, submitted, unless_gone
from rk_export.runtime.server.openai_types import Sampling
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.reading import read
from rk_export.runtime.server.settings import ServerSettings
from rk_export.runtime.server.sse import EventStream


class HasRequests(Protocol):
    """What a body asks of the engine."""

    @property
    def requests(self) -> tuple[Request, ...]:
        """One for each answer."""


BodyT = TypeVar("BodyT", bound=Sampling)
WorkT = TypeVar("WorkT", bound=HasRequests)


@dataclass(frozen=True)
class Form(Generic[BodyT, WorkT]):
    """One form of questions and answers.

    Args:
        body: The type of the body.
        work: Makes requests of a body; it runs in a thread, and raises ApiError.
        whole: Makes the response of all answers.
        chunks: Makes the events of a stream.
    """

    body: type[BodyT]
    work: Callable[[BodyT, Decoder, ServerSettings], WorkT]
    whole: Callable[[WorkT, list[Answer]], dict[str, Any]]
    chunks: Callable[[WorkT, Answers], AsyncIterator[dict[str, Any]]]


async def respond(request: HttpRequest, form: Form[BodyT, WorkT]) -> Response:
    """Answer a request; its model stays open until the last piece is sent or the client leaves."""
    context = context_of(request)
    body = await read(request, form.body)
    watch = Watch.start(body.model, context.metrics, context.settings)
    with ExitStack() as stack:
        decoder = await context.models.decoder(body.model, stack)
        work = await prepared(request, watch, partial(form.work, body, decoder, context.settings))
        answers = stack.enter_context(submitted(decoder, work.requests, watch))
        if body.stream:
            return EventStream(form.chunks(work, answers), stack.pop_all().close)
        return JsonResponse(form.whole(work, await unless_gone(request, answers.all())))

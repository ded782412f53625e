"""``POST /v1/completions``: a prompt, or several, continued."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rk_export.runtime.engine.records import Answer, Request, TokenScore
from rk_export.runtime.server.generation import (
    FINISH,
    Answers,
    check_count,
    now,
    room_for,
    usage,
)
from rk_export.runtime.server.logprobs import Offsets, completion_logprobs
from rk_export.runtime.server.openai_types import CompletionRequest
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.respond import Form, respond
from rk_export.runtime.server.settings import ServerSettings

_DEFAULT_TOKENS = 16  # OpenAI's


@dataclass(frozen=True)
class Work:
    """A request as the engine takes it.

    Args:
        body: What the client sent.
        decoder: The model.
        requests: One for each answer; those to one prompt stand together.
        echoes: The text that stands before each answer.
        head: The fields that all parts of the response share.
    """

    body: CompletionRequest
    decoder: Decoder
    requests: tuple[Request, ...]
    echoes: tuple[str, ...]
    head: dict[str, Any]

    def choice(
        self, index: int, text: str, scores: tuple[TokenScore, ...], offsets: Offsets, reason: str | None
    ) -> dict[str, Any]:
        """Return one choice; ``offsets`` are those of its answer."""
        asked = self.body.logprobs is not None
        found = completion_logprobs(self.decoder, scores, offsets) if asked else None
        return {"index": index, "text": text, "logprobs": found, "finish_reason": reason}


def _work(body: CompletionRequest, decoder: Decoder, settings: ServerSettings) -> Work:
    prompts = _prompts(body)
    check_count(len(prompts) * body.samples, decoder, settings)
    codec = decoder.session.text_codec
    tokens = [codec.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    wanted = body.max_tokens
    room = room_for(decoder, tokens, wanted, settings)
    if body.logprobs is not None:
        decoder.byte_tokens  # noqa: B018 - read here, in a thread
    options = body.options(room if wanted is not None else min(room, _DEFAULT_TOKENS), body.logprobs)
    requests = tuple(
        Request(tuple(prompt), options, sample=sample) for prompt in tokens for sample in range(body.samples)
    )
    texts = [prompt if isinstance(prompt, str) else codec.decode(prompt) for prompt in prompts if body.echo]
    echoes = [text for text in texts for _ in range(body.samples)] or [""] * len(requests)
    head = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": now(),
        "model": body.model,
    }
    return Work(body, decoder, requests, tuple(echoes), head)


def _prompts(body: CompletionRequest) -> list[str | list[int]]:
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if prompt and isinstance(prompt[0], int):
        return [[int(token) for token in prompt if isinstance(token, int)]]
    return [item for item in prompt if not isinstance(item, int)] or [[]]


def _whole(work: Work, answers: list[Answer]) -> dict[str, Any]:
    choices = [
        work.choice(
            index, echo + answer.text, answer.scores, Offsets(len(echo)), FINISH[answer.finish_reason]
        )
        for index, (echo, answer) in enumerate(zip(work.echoes, answers, strict=True))
    ]
    return {**work.head, "choices": choices, "usage": usage(answers, work.body.samples)}


async def _chunks(work: Work, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    """Yield pieces as they come, and the usage at last where it is wanted."""
    head = {**work.head, "usage": None} if work.body.with_usage else work.head
    offsets, found = [Offsets(len(echo)) for echo in work.echoes], {}
    for index, echo in enumerate(work.echoes):
        if echo:
            yield {**head, "choices": [work.choice(index, echo, (), offsets[index], None)]}
    async for index, event in answers.events():
        if isinstance(event, Answer):
            found[index] = event
            reason = FINISH[event.finish_reason]
            yield {**head, "choices": [work.choice(index, "", (), offsets[index], reason)]}
        elif event.text or event.scores:
            yield {**head, "choices": [work.choice(index, event.text, event.scores, offsets[index], None)]}
    if work.body.with_usage:
        ordered = [found[index] for index in sorted(found)]
        yield {**work.head, "choices": [], "usage": usage(ordered, work.body.samples)}


_FORM = Form(CompletionRequest, _work, _whole, _chunks)


async def create_completion(request: HttpRequest) -> Response:
    """Continue prompts."""
    return await respond(request, _FORM)

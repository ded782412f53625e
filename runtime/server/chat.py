"""``POST /v1/chat/completions``: a conversation answered."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rk_export.runtime.engine.records import Answer, Request, TokenScore
from rk_export.runtime.server.call_watcher import CallWatcher
from rk_export.runtime.server.chat_prompt import ToolUse, chat_tokens, schema_of, tool_use
from rk_export.runtime.server.generation import (
    FINISH,
    Answers,
    check_count,
    now,
    room_for,
    usage,
)
from rk_export.runtime.server.logprobs import chat_logprobs
from rk_export.runtime.server.openai_types import ChatRequest
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.respond import Form, respond
from rk_export.runtime.server.settings import ServerSettings


@dataclass(frozen=True)
class Work:
    """A request as the engine takes it.

    Args:
        body: What the client sent.
        decoder: The model.
        requests: One for each answer.
        tools: What the model may call.
        head: The fields that all parts of the response share.
    """

    body: ChatRequest
    decoder: Decoder
    requests: tuple[Request, ...]
    tools: ToolUse
    head: dict[str, Any]

    def watcher(self) -> CallWatcher:
        """Return what finds the calls of one answer."""
        most = 1 if self.body.parallel_tool_calls is False else None
        tools = self.tools
        return CallWatcher(self.decoder, tools.form, tools.names, forced=tools.forced, most=most)

    def choice(
        self, index: int, part: dict[str, Any], scores: tuple[TokenScore, ...], reason: str | None
    ) -> dict[str, Any]:
        """Return one choice; ``part`` is its message or its delta."""
        found = chat_logprobs(self.decoder, scores) if self.body.logprobs and scores else None
        return {"index": index, **part, "logprobs": found, "finish_reason": reason}


def _work(body: ChatRequest, decoder: Decoder, settings: ServerSettings) -> Work:
    check_count(body.samples, decoder, settings)
    tools = tool_use(body, decoder)
    prompt = tuple(chat_tokens(body, decoder, tools))
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = body.options(room_for(decoder, [prompt], wanted, settings, field="messages"), logprobs)
    if body.logprobs:
        decoder.byte_tokens  # noqa: B018 - read here, in a thread
    found = schema_of(body, tools)
    kept = None if found is None else decoder.grammar.constraint(*found)
    requests = tuple(Request(prompt, options, kept and kept.copy(), sample) for sample in range(body.samples))
    kind = "chat.completion.chunk" if body.stream else "chat.completion"
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": now(), "model": body.model}
    return Work(body, decoder, requests, tools, head)


def _whole(work: Work, answers: list[Answer]) -> dict[str, Any]:
    choices = []
    for index, answer in enumerate(answers):
        text, calls = work.watcher().read(answer)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if calls:
            message = {
                **message,
                "content": text or None,
                "tool_calls": [call.for_openai() for call in calls],
            }
        reason = "tool_calls" if calls else FINISH[answer.finish_reason]
        choices.append(work.choice(index, {"message": message}, answer.scores, reason))
    return {**work.head, "choices": choices, "usage": usage(answers, work.body.samples)}


async def _chunks(work: Work, answers: Answers) -> AsyncIterator[dict[str, Any]]:
    """Yield pieces as they come, calls when they are whole, and the usage at last where it is wanted."""
    head = {**work.head, "usage": None} if work.body.with_usage else work.head
    watchers, found = [work.watcher() for _ in work.requests], {}

    def chunk(
        index: int, delta: dict[str, Any], scores: tuple[TokenScore, ...] = (), reason: str | None = None
    ) -> dict[str, Any]:
        return {**head, "choices": [work.choice(index, {"delta": delta}, scores, reason)]}

    for index in range(len(watchers)):
        yield chunk(index, {"role": "assistant", "content": ""})
    async for index, event in answers.events():
        if not isinstance(event, Answer):
            text = watchers[index].push(event)
            if text or event.scores:
                yield chunk(index, {"content": text}, event.scores)
            continue
        found[index] = event
        text, calls = watchers[index].end(event)
        if text:
            yield chunk(index, {"content": text})
        if calls:
            yield chunk(index, {"tool_calls": [call.for_openai(number) for number, call in enumerate(calls)]})
        yield chunk(index, {}, reason="tool_calls" if calls else FINISH[event.finish_reason])
    if work.body.with_usage:
        ordered = [found[index] for index in sorted(found)]
        yield {**work.head, "choices": [], "usage": usage(ordered, work.body.samples)}


_FORM = Form(ChatRequest, _work, _whole, _chunks)


async def create_chat_completion(request: HttpRequest) -> Response:
    """Answer a conversation."""
    return await respond(request, _FORM)

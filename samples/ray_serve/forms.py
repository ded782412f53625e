"""OpenAI's forms of requests and answers, as far as the sample takes them. Nothing here needs Ray."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rk_export.errors import InputError
from rk_export.runtime.engine import Answer
from rk_export.runtime.options import FinishReason, GenerationOptions

Json = dict[str, Any]

# Fields that reach GenerationOptions under the same name, and the type that JSON must bring.
_OPTIONS: dict[str, type | tuple[type, ...]] = {
    "temperature": (int, float),
    "top_p": (int, float),
    "seed": int,
    "top_k": int,
    "min_p": (int, float),
    "repetition_penalty": (int, float),
}
_TAKEN = {"model", "max_tokens", "stop", "stream", "stream_options", "n", "user", *_OPTIONS}
_TOKENS = 16  # of a completion whose request names no number, as OpenAI has it
_CHAT_TOKENS = 512


@dataclass(frozen=True)
class Refusal:
    """Why a request gets no answer.

    Args:
        status: The HTTP status.
        message: What is wrong and how to mend it.
        code: The same for programs.
        param: The field at fault.
        retry_after: Seconds after which the client may try again.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None

    @classmethod
    def of(cls, error: InputError, param: str | None = None) -> Refusal:
        """Turn an error into a refusal. Its ``where`` may be a path of this machine, so it stays here."""
        fix = "" if error.fix is None else f": {error.fix}"
        return cls(400, f"{error.what}{fix}", "invalid_request", param)

    def body(self) -> Json:
        """Return the JSON that OpenAI's clients read."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Ask:
    """A checked request.

    Args:
        model: The name of a model.
        prompt: The text or the tokens to continue, or None in a chat.
        messages: The conversation, or None where there is a prompt.
        options: How to choose tokens and when to end.
        stream: Whether the answer comes piece by piece.
        usage: Whether a stream ends with the numbers of tokens.
    """

    model: str
    prompt: str | tuple[int, ...] | None
    messages: tuple[Json, ...] | None
    options: GenerationOptions
    stream: bool = False
    usage: bool = False

    @classmethod
    def of(cls, body: Any, *, chat: bool) -> Ask:
        """Read a request's JSON.

        Raises:
            InputError: A field is missing, of the wrong type, out of range, or not known here; ``where`` names it.
        """
        _require(isinstance(body, Mapping), "body", "is no JSON object")
        given = {name: value for name, value in body.items() if value is not None}
        own = {"messages", "max_completion_tokens"} if chat else {"prompt"}
        for name in sorted(given.keys() - _TAKEN - own):
            _require(False, name, "is not known here")
        _require(isinstance(given.get("model"), str), "model", "names no model")
        _require(given.get("n", 1) == 1, "n", "may only be 1")
        _require(isinstance(given.get("stream", False), bool), "stream", "is neither true nor false")
        return cls(
            given["model"],
            None if chat else _prompt(given.get("prompt")),
            _messages(given.get("messages")) if chat else None,
            _options(given, _CHAT_TOKENS if chat else _TOKENS),
            given.get("stream", False),
            _usage(given.get("stream_options", {})),
        )


@dataclass(frozen=True)
class Reply:
    """Writes the answer to one request."""

    ask: Ask
    id: str = field(default_factory=lambda: f"rk-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> Json:
        """Return the body of an answer that is not streamed."""
        chat = self.ask.messages is not None
        text = {"message": {"role": "assistant", "content": answer.text}} if chat else {"text": answer.text}
        body = self._body("chat.completion" if chat else "text_completion", text, _reason(answer))
        return {**body, "usage": _counts(answer)}

    def piece(self, text: str, *, first: bool) -> str:
        """Return the event of a piece of text."""
        return self._event({**({"role": "assistant"} if first else {}), "content": text}, text, None)

    def end(self, answer: Answer) -> str:
        """Return the events that end a stream: the reason, the numbers where asked for, and OpenAI's mark."""
        events = self._event({}, "", _reason(answer))
        if self.ask.usage:
            events += event({**self._chunk({}, "", None), "choices": [], "usage": _counts(answer)})
        return f"{events}data: [DONE]\n\n"

    def _event(self, delta: Json, text: str, reason: str | None) -> str:
        return event(self._chunk(delta, text, reason))

    def _chunk(self, delta: Json, text: str, reason: str | None) -> Json:
        if self.ask.messages is not None:
            return self._body("chat.completion.chunk", {"delta": delta}, reason)
        return self._body("text_completion", {"text": text}, reason)

    def _body(self, kind: str, content: Json, reason: str | None) -> Json:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.ask.model}
        return {**head, "choices": [choice]}


def event(body: Json) -> str:
    """Return a server-sent event."""
    return f"data: {json.dumps(body)}\n\n"


def _prompt(value: Any) -> str | tuple[int, ...]:
    if isinstance(value, str):
        return value
    whole = isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
    _require(whole, "prompt", "is neither a text nor a list of token ids")
    return tuple(value)


def _messages(value: Any) -> tuple[Json, ...]:
    fits = isinstance(value, list) and bool(value) and all(isinstance(message, dict) for message in value)
    _require(fits, "messages", "is no list of messages")
    return tuple(value)


def _options(given: Mapping[str, Any], tokens: int) -> GenerationOptions:
    for name, kind in {**_OPTIONS, "max_tokens": int, "max_completion_tokens": int}.items():
        value = given.get(name, 0)
        _require(
            isinstance(value, kind) and not isinstance(value, bool), name, f"{value!r} is no number for it"
        )
    stop = given.get("stop", [])
    stops = [stop] if isinstance(stop, str) else stop
    _require(
        isinstance(stops, list) and all(isinstance(s, str) for s in stops), "stop", "is no list of texts"
    )
    chosen = {name: given[name] for name in _OPTIONS if name in given}
    most = given.get("max_completion_tokens", given.get("max_tokens", tokens))
    # OpenAI's default temperature is 1, ours is 0.
    return GenerationOptions(**{"temperature": 1.0, **chosen}, max_new_tokens=most, stop=tuple(stops))


def _usage(value: Any) -> bool:
    _require(
        isinstance(value, dict) and not value.keys() - {"include_usage"},
        "stream_options",
        "is not known here",
    )
    return bool(value.get("include_usage"))


def _reason(answer: Answer) -> str:
    return "length" if answer.finish_reason is FinishReason.LENGTH else "stop"


def _counts(answer: Answer) -> Json:
    new = len(answer.token_ids)
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": new,
        "total_tokens": answer.prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": answer.cached_tokens},
    }


def _require(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise InputError(what, where=name, fix="see OpenAI's reference of the request")

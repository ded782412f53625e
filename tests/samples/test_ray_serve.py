"""The sample for Ray Serve without Ray: when a request is repeated, and OpenAI's forms by its own types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from ray_serve.forms import Ask, Refusal, Reply
from ray_serve.repeat import LostAnswerError, Repeated

from rk_export.errors import InputError
from rk_export.runtime.engine import Answer
from rk_export.runtime.options import FinishReason, GenerationOptions

ANSWER = Answer("sea", (115, 101, 97), FinishReason.LENGTH, prompt_tokens=4, cached_tokens=2)


class DeadError(Exception):
    """Stands for a replica's death."""


class Replicas:
    """Answers in turn: each gives out its events, then dies or ends."""

    def __init__(self, *scripts: tuple[list[str], bool]) -> None:
        self.scripts, self.closed = list(scripts), 0

    async def attempt(self) -> AsyncGenerator[str, None]:
        events, dies = self.scripts.pop(0)
        try:
            for event in events:
                yield event
            if dies:
                raise DeadError
        finally:
            self.closed += 1


def told(replicas: Replicas, **options: Any) -> tuple[list[str], Repeated[str], Exception | None]:
    """Return the events that came, who brought them, and what ended them early."""
    tries = Repeated(replicas.attempt, (DeadError,), pause=0, **options)
    came: list[str] = []

    async def listen() -> None:
        async for event in tries.events():
            came.append(event)  # noqa: PERF401  what came stays where an error ends it

    try:
        asyncio.run(listen())
    except Exception as error:
        return came, tries, error
    return came, tries, None


def test_a_whole_answer_is_asked_for_once() -> None:
    replicas = Replicas((["a", "b"], False), (["no"], False))
    came, tries, error = told(replicas)
    assert (came, tries.made, error) == (["a", "b"], 1, None)
    assert replicas.closed == 1


def test_what_died_before_an_event_is_asked_again() -> None:
    replicas = Replicas(([], True), ([], True), (["a", "b"], False))
    came, tries, error = told(replicas)
    assert (came, tries.made, error) == (["a", "b"], 3, None)
    assert replicas.closed == 3


def test_what_died_after_an_event_ends_and_is_never_mixed() -> None:
    replicas = Replicas((["a"], True), (["x", "y"], False))
    came, tries, error = told(replicas)
    assert (came, tries.made) == (["a"], 1)
    assert isinstance(error, LostAnswerError)
    assert error.begun
    assert "discard" in str(error)
    assert isinstance(error.__cause__, DeadError)


def test_a_request_that_kills_every_replica_ends() -> None:
    replicas = Replicas(*[([], True)] * 5)
    came, tries, error = told(replicas, most=2)
    assert (came, tries.made, len(replicas.scripts)) == ([], 2, 3)
    assert isinstance(error, LostAnswerError)
    assert not error.begun


def test_another_error_is_no_death() -> None:
    async def broken() -> AsyncGenerator[str, None]:
        raise ValueError("broken")
        yield ""

    tries = Repeated(broken, (DeadError,))
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(anext(tries.events()))
    assert tries.made == 1


def test_a_listener_that_leaves_closes_the_attempt() -> None:
    replicas = Replicas((["a", "b"], False))

    async def leave() -> None:
        events = Repeated(replicas.attempt, (DeadError,)).events()
        assert await anext(events) == "a"
        assert replicas.closed == 0
        await events.aclose()

    asyncio.run(leave())
    assert replicas.closed == 1


def test_waits_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr("ray_serve.repeat.asyncio.sleep", wait)
    told_pause = Repeated(Replicas(*[([], True)] * 4).attempt, (DeadError,), most=4, pause=0.5)
    with pytest.raises(LostAnswerError):
        asyncio.run(anext(told_pause.events()))
    assert waits == [0.5, 1, 2]


def test_a_request_becomes_options() -> None:
    body = {"model": "m", "prompt": [1, 2], "max_tokens": 5, "top_p": 0.5, "seed": 3, "stop": "x", "n": 1}
    ask = Ask.of({**body, "user": "somebody", "stream": None}, chat=False)
    options = GenerationOptions(max_new_tokens=5, temperature=1.0, top_p=0.5, seed=3, stop=("x",))
    assert ask == Ask("m", (1, 2), None, options)
    chat = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_completion_tokens": 7}
    ask = Ask.of({**chat, "stream": True, "stream_options": {"include_usage": True}}, chat=True)
    assert (ask.messages, ask.prompt) == (({"role": "user", "content": "hi"},), None)
    assert (ask.options.max_new_tokens, ask.stream, ask.usage) == (7, True, True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model", None),
        ("prompt", 5),
        ("prompt", ["two", "texts"]),
        ("prompt", [True]),
        ("messages", [{"role": "user"}]),
        ("n", 2),
        ("stream", "yes"),
        ("max_tokens", 2.5),
        ("temperature", "hot"),
        ("seed", True),
        ("stop", [1]),
        ("stream_options", {"other": 1}),
        ("logit_bias", {}),
    ],
)
def test_a_field_that_is_wrong_or_unknown_is_named(field: str, value: Any) -> None:
    with pytest.raises(InputError) as refused:
        Ask.of({"model": "m", "prompt": "p", field: value}, chat=False)
    assert refused.value.where == field


def test_a_refusal_keeps_the_place_to_itself() -> None:
    refusal = Refusal.of(InputError("no chat template", where="/models/secret", fix="give a prompt"))
    assert refusal.body()["error"]["message"] == "no chat template: give a prompt"
    assert "secret" not in json.dumps(refusal.body())


def test_answers_have_openais_form() -> None:
    chat = Ask.of({"model": "m", "messages": [{}], "stream_options": {"include_usage": True}}, chat=True)
    plain = Ask.of({"model": "m", "prompt": "p"}, chat=False)
    whole = Completion.model_validate(Reply(plain).whole(ANSWER), strict=True)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == ("sea", "length")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.total_tokens) == (4, 7)
    said = ChatCompletion.model_validate(Reply(chat).whole(ANSWER), strict=True)
    assert said.choices[0].message.content == "sea"
    reply = Reply(chat)
    text = reply.piece("se", first=True) + reply.piece("a", first=False) + reply.end(ANSWER)
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [ChatCompletionChunk.model_validate_json(event.removeprefix("data: ")) for event in events]
    *pieces, end, usage = chunks
    assert [(piece.choices[0].delta.role, piece.choices[0].delta.content) for piece in pieces] == [
        ("assistant", "se"),
        (None, "a"),
    ]
    assert end.choices[0].finish_reason == "length"
    assert usage.choices == []
    assert usage.usage is not None
    assert usage.usage.completion_tokens == 3

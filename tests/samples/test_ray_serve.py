"""The sample for Ray Serve without Ray: when a request is repeated, and how a server is asked within the process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest
from ray_serve.inside import Call, Head, Part, brings_text, parts_of
from ray_serve.repeat import LostAnswerError, Repeated
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route


class DeadError(Exception):
    """Stands for a replica's death."""


def commits(part: str) -> bool:
    """Small letters have to reach the client at once."""
    return part.islower()


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
    tries = Repeated(replicas.attempt, (DeadError,), commits, pause=0, **options)
    came: list[str] = []

    async def listen() -> None:
        async for event in tries.parts():
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


def test_what_is_held_back_is_forgotten_with_its_replica() -> None:
    replicas = Replicas((["HEAD", "ROLE"], True), (["HEAD", "OTHER", "b", "C"], False))
    came, tries, error = told(replicas)
    assert (came, tries.made, error) == (["HEAD", "OTHER", "b", "C"], 2, None)


def test_an_answer_without_any_text_comes_at_its_end() -> None:
    came, tries, error = told(Replicas((["HEAD", "END"], False)))
    assert (came, tries.made, error) == (["HEAD", "END"], 1, None)


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

    tries = Repeated(broken, (DeadError,), commits)
    with pytest.raises(ValueError, match="broken"):
        asyncio.run(anext(tries.parts()))
    assert tries.made == 1


def test_a_listener_that_leaves_closes_the_attempt() -> None:
    replicas = Replicas((["a", "b"], False))

    async def leave() -> None:
        events = Repeated(replicas.attempt, (DeadError,), commits).parts()
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
    tries = Repeated(Replicas(*[([], True)] * 4).attempt, (DeadError,), commits, most=4, pause=0.5)
    with pytest.raises(LostAnswerError):
        asyncio.run(anext(tries.parts()))
    assert waits == [0.5, 1, 2]


async def greet(request: Request) -> Response:
    return JSONResponse(
        {"body": json.loads(await request.body())}, 201, {"X-Mark": request.headers["x-given"]}
    )


async def count(request: Request) -> Response:
    async def numbers() -> AsyncIterator[bytes]:
        try:
            for number in range(100):
                yield b"%d" % number
                await asyncio.sleep(0)
        finally:
            request.app.state.ended = True

    return StreamingResponse(numbers())


async def wait(request: Request) -> Response:
    try:
        await asyncio.sleep(60)
    finally:
        request.app.state.ended = True
    return Response()


async def fail(request: Request) -> Response:
    raise ValueError("broken")


@pytest.fixture
def app() -> Starlette:
    return Starlette(
        routes=[Route(f"/{f.__name__}", f, methods=["POST"]) for f in (greet, count, wait, fail)]
    )


def asked(app: Starlette, call: Call) -> list[Part]:
    async def parts() -> list[Part]:
        return [part async for part in parts_of(app, call)]

    return asyncio.run(parts())


def test_a_call_is_answered(app: Starlette) -> None:
    head, body = asked(app, Call("POST", "/greet", ((b"x-given", b"7"),), b"[1]"))
    assert isinstance(head, Head)
    assert head.status == 201
    assert dict(head.headers)[b"x-mark"] == b"7"
    assert body == b'{"body":[1]}'
    missing, *_ = asked(app, Call("POST", "/other"))
    assert isinstance(missing, Head)
    assert missing.status == 404


def test_a_stream_comes_in_its_parts(app: Starlette) -> None:
    _, *parts = asked(app, Call("POST", "/count"))
    assert parts == [b"%d" % number for number in range(100)]


def test_an_error_is_the_callers(app: Starlette) -> None:
    with pytest.raises(ValueError, match="broken"):
        asked(app, Call("POST", "/fail"))


@pytest.mark.parametrize("path", ["/count", "/wait"])
def test_a_caller_that_leaves_ends_the_answer(app: Starlette, path: str) -> None:
    app.state.ended = False

    async def leave() -> None:
        async with aclosing(parts_of(app, Call("POST", path))) as parts:
            listening = asyncio.ensure_future(anext(parts))
            await asyncio.wait({listening}, timeout=0.1)
            assert not app.state.ended
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    asyncio.run(leave())
    assert app.state.ended


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (Head(200, ()), False),
        (b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n', False),
        (b'data: {"choices":[{"index":0,"delta":{"content":"sea"}}]}\n\n', True),
        (b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]}\n\n', True),
        (b'data: {"choices":[{"index":0,"text":"","logprobs":null}]}\n\n', False),
        (b'data: {"choices":[{"index":0,"text":""},{"index":1,"text":"sea"}]}\n\n', True),
        (b"data: [DONE]\n\n", True),
        (b'data: {"error":{"message":"no"}}\n\n', True),
        (b"data: [1]", True),
    ],
)
def test_the_role_alone_is_no_text(part: Part, expected: bool) -> None:
    assert brings_text(part) is expected

"""Asks an ASGI application within the process, and yields its answer as it comes. Nothing here needs Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import ASGIApp, Message

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True)
class Call:
    """A whole HTTP request.

    Args:
        method: ``GET``, ``POST`` ...
        path: Without the query.
        headers: Names in lower case, and values.
        body: The body.
    """

    method: str
    path: str
    headers: Headers = ()
    body: bytes = b""


@dataclass(frozen=True)
class Head:
    """What comes before the body of an answer.

    Args:
        status: HTTP status.
        headers: Names in lower case, and values.
    """

    status: int
    headers: Headers


Part = Head | bytes


async def parts_of(app: ASGIApp, call: Call) -> AsyncGenerator[Part, None]:
    """Yield the head of the answer, then its body as the application sends it.

    Closing the generator, or cancelling the task that reads it, cancels the application's task.

    Raises:
        Exception: What the application raises.
    """
    messages: asyncio.Queue[Message | None] = asyncio.Queue()
    body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

    async def receive() -> Message:
        if body:
            return body.pop()
        await asyncio.Event().wait()  # for ever: a caller who leaves cancels the task
        raise AssertionError

    async def send(message: Message) -> None:
        messages.put_nowait(message)

    task = asyncio.ensure_future(app(_scope(call), receive, send))
    task.add_done_callback(lambda _: messages.put_nowait(None))
    try:
        while (message := await messages.get()) is not None:
            if message["type"] == "http.response.start":
                yield Head(
                    message["status"], tuple((name.lower(), value) for name, value in message["headers"])
                )
            elif message.get("body"):
                yield message["body"]
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def brings_text(part: Part) -> bool:
    """Return whether a part of a stream holds something of an answer, rather than what stands before it.

    A chat begins with an event that names the role alone. What cannot be read counts as an answer.
    """
    if isinstance(part, Head):
        return False
    try:
        choices = json.loads(part.removeprefix(b"data: "))["choices"]
        pieces = [choice.get("delta", choice) for choice in choices]
        return any(piece.get(name) for piece in pieces for name in ("text", "content", "tool_calls"))
    except (ValueError, LookupError, TypeError, AttributeError):
        return True


def _scope(call: Call) -> dict[str, object]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": call.method,
        "scheme": "http",
        "path": call.path,
        "raw_path": call.path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": list(call.headers),
        "client": None,
        "server": None,
    }

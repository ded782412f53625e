"""What a request passes before a route sees it: an id, the keys, the drain, and the bound of its body."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
import time
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rk_export.runtime.server.context import Context
from rk_export.runtime.server.errors import ApiError, failed, unavailable
from rk_export.runtime.server.logs import event, request_id

_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_GUARDED = ("/v1", "/v2")
_PROBES = (
    "/health/live",
    "/health/ready",
    "/v2/health/live",
    "/v2/health/ready",
    "/metrics",
)  # every few seconds
_GONE = 499  # the client left: nobody reads the status, but the figures and the log do
logger = logging.getLogger("rk_export.server")


class Journal:
    """Gives every request an id, logs it, counts it, and answers what nobody expected.

    Args:
        app: What answers.
        context: The server.
    """

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._context = app, context

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identity = given if _ID.fullmatch(given) else uuid.uuid4().hex
        token, begin, status = request_id.set(identity), time.perf_counter(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = identity
                headers["X-Content-Type-Options"] = "nosniff"
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            logger.exception("a request failed")
            if status:
                raise  # half an answer has been sent: the connection must break
            await failed(identity).response(scope["path"])(scope, receive, noted)
        finally:
            self._close(scope, status or _GONE, time.perf_counter() - begin)
            request_id.reset(token)

    def _close(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        metrics = self._context.metrics
        metrics.requests.labels(route, str(status)).inc()
        metrics.seconds.labels(route).observe(seconds)
        method = scope["method"] if len(scope["method"]) < 16 else "other"
        level = logging.DEBUG if route in _PROBES else logging.INFO
        event("request", level, method=method, route=route, status=status, seconds=round(seconds, 4))


class Gate:
    """Lets in who has a key, unless the server is ending; counts who is inside.

    Args:
        app: What answers.
        context: The server.
    """

    def __init__(self, app: ASGIApp, context: Context) -> None:
        self._app, self._state = app, context.state
        self._keys = tuple(key.encode() for key in context.settings.keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        path = scope.get("path", "")
        guarded = path.startswith(_GUARDED) and not path.startswith("/v2/health")
        if scope["type"] != "http" or not guarded:
            await self._app(scope, receive, send)
            return
        error = self._refusal(Headers(scope=scope).get("authorization", ""))
        if error is not None:
            await error.response(path)(scope, receive, send)
            return
        self._state.running += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.running -= 1

    def _refusal(self, authorization: str) -> ApiError | None:
        if self._keys and not _is_one_of(authorization, self._keys):
            return ApiError(
                401,
                "send one of the server's keys: Authorization: Bearer KEY",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._state.draining:
            return unavailable("the server is shutting down", "shutting_down")
        return None if self._state.ready else unavailable("the models are being opened", "loading")


def _is_one_of(authorization: str, keys: Sequence[bytes]) -> bool:
    scheme, _, given = authorization.partition(" ")
    if scheme.lower() != "bearer":
        return False
    # Every key is compared, so that the time tells nothing.
    sent = given.strip(" \t").encode("latin-1")  # the bytes of the header, which are read as Latin-1
    found = [hmac.compare_digest(sent, key) for key in keys]
    return any(found)


class BodyLimit:
    """Reads a body before anybody parses it, and refuses one that is too large or too slow.

    Args:
        app: What answers.
        most: Most bytes.
        seconds: Until the body has arrived.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app, self._most, self._seconds = app, most, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            stated = Headers(scope=scope).get("content-length", "0")
            if stated.isdigit() and int(stated[:20]) > self._most:
                raise self._too_large()
            async with asyncio.timeout(self._seconds):
                body = await self._read(receive)
        except TimeoutError:
            slow = ApiError(
                408, "the body did not arrive in time", code="timeout", headers={"Connection": "close"}
            )
            await slow.response(scope["path"])(scope, receive, send)
            return
        except ApiError as error:
            await error.response(scope["path"])(scope, receive, send)
            return
        if body is None:
            return
        message: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replayed() -> Message:
            nonlocal message
            if message is None:
                return await receive()
            first, message = message, None
            return first

        await self._app(scope, replayed, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """Return the body, or None where the client left."""
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part = message.get("body", b"")
            size += len(part)
            if size > self._most:
                raise self._too_large()
            parts.append(part)
            more = message.get("more_body", False)
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        text = f"the body is larger than {self._most} bytes"
        return ApiError(413, text, code="body_too_large", headers={"Connection": "close"})

"""Which bodies are read: JSON or tensors as bytes, named as such, and not compressed."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from rk_export.runtime.server.errors import ApiError


class BodyTypes:
    """Refuses a body whose type a page of another site can send without asking.

    Browsers ask the server first (CORS) where a page sends one of the types that are taken here.

    Args:
        app: What answers.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and scope["method"] == "POST":
            reason = _refusal(Headers(scope=scope), tensors=scope["path"].startswith("/v2"))
            if reason is not None:
                error = ApiError(415, reason, code="unsupported_media_type")
                await error.response(scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _refusal(headers: Headers, *, tensors: bool) -> str | None:
    if headers.get("content-encoding", "identity").strip().lower() != "identity":
        return "compressed bodies are not read"
    given = headers.get("content-type", "").partition(";")[0].strip().lower()
    if not given and tensors and "origin" not in headers:
        return None  # Triton's client names no type; a browser never leaves out its origin
    if given == "application/json" or (tensors and given == "application/octet-stream"):
        return None
    return f"the body is {given!r}; send application/json" if given else "send Content-Type: application/json"

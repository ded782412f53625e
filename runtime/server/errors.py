"""Errors as clients get them: OpenAI's form, or that of the Open Inference Protocol below ``/v2``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from rk_export.errors import RkExportError
from rk_export.runtime.engine.records import EngineClosedError, QueueFullError

_PATH = re.compile(r"[/\\]")
# What options of the runtime are called in requests.
_PARAMS = {"max_new_tokens": "max_tokens"}


class ApiError(Exception):
    """An answer that is an error.

    Args:
        status: HTTP status.
        message: What is wrong, for the developer of the client.
        kind: OpenAI's ``type``; None takes the usual one of the status.
        param: The field at fault.
        code: A word that programs can compare.
        headers: More headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.headers = dict(headers or {})

    def body(self, path: str = "/v1") -> dict[str, Any]:
        """Return the JSON of the error in the form of a path's protocol."""
        if path.startswith("/v2"):
            return {"error": self.message}
        fields = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": fields}

    def response(self, path: str) -> Response:
        """Return the whole answer."""
        return JsonResponse(self.body(path), self.status, self.headers)


class JsonResponse(Response):
    """JSON in UTF-8; half a surrogate pair, which a client may have sent, becomes a question mark."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Return the bytes of a value."""
        return json_bytes(content)


def json_bytes(value: Any) -> bytes:
    """Return a value as compact JSON in UTF-8."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that cannot be understood or is out of range."""
    return ApiError(400, message, param=param, code=code)


def unavailable(message: str, code: str, *, after: int = 1) -> ApiError:
    """Return the error of a server that cannot answer now; ``after`` seconds later it may."""
    return ApiError(503, message, code=code, headers={"Retry-After": str(after)})


def timed_out(seconds: float) -> ApiError:
    """Return the error of an answer that took too long."""
    return ApiError(504, f"the answer took longer than {seconds:g} seconds", code="timeout")


def failed(request_id: str) -> ApiError:
    """Return the error of a fault of the server: the log knows more under the request's id."""
    return ApiError(
        500, f"the server failed; its log tells more under request {request_id}", code="internal_error"
    )


def refused(error: RkExportError) -> ApiError:
    """Return the error of a request that the engine or the bundle refuses; no path of this machine is told."""
    if isinstance(error, QueueFullError):
        return ApiError(
            429,
            "as many requests are waiting as may; try again later",
            kind="rate_limit_error",
            code="queue_full",
            headers={"Retry-After": "1"},
        )
    if isinstance(error, EngineClosedError):
        return unavailable("the server is shutting down or closed the model", "shutting_down")
    where = error.where if error.where and not _PATH.search(error.where) else None
    message = error.what if where is None else f"{where}: {error.what}"
    fix = "" if error.fix is None or _PATH.search(error.fix) else f". {error.fix[:1].upper()}{error.fix[1:]}"
    return bad_request(message + fix, _PARAMS.get(where or "", where))

"""Server-sent events: pieces of an answer while they come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from rk_export.errors import RkExportError
from rk_export.runtime.server.context import Context
from rk_export.runtime.server.errors import ApiError, failed, json_bytes, refused
from rk_export.runtime.server.logs import event, request_id

_LAST_SECONDS = 1.0  # for the event which tells that the answer takes too long
DONE = b"data: [DONE]\n\n"
logger = logging.getLogger("rk_export.server")


class EventStream(StreamingResponse):
    """A stream of JSON objects, and ``[DONE]`` at its end.

    Args:
        chunks: The objects.
        close: Frees what the stream holds, however it ends: the client may leave before it begins.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[dict[str, Any]], close: Callable[[], object]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(chunks), headers=headers)
        self._close = close
        self._context: Context | None = None  # known when the events are sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a client that does not read them is not waited for longer than an answer may take."""
        self._context = scope["app"].state.context
        try:
            async with asyncio.timeout(self._context.settings.timeout + _LAST_SECONDS) as clock:
                await super().__call__(scope, receive, send)
        except TimeoutError:
            if not clock.expired():
                raise
            event("a client does not read its stream", logging.WARNING)  # the connection is closed
        finally:
            self._close()

    async def _lines(self, chunks: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
        """Yield events; an error is the last one, since the status has been sent."""
        try:
            async for chunk in chunks:
                yield _line(chunk)
            yield DONE
        except ApiError as error:
            yield _line(error.body())
        except RkExportError as error:
            assert self._context is not None
            fault = self._context.ended_by_fault(error)
            yield _line((failed(request_id.get()) if fault else refused(error)).body())
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("a stream failed")
            yield _line(failed(request_id.get()).body())


def _line(chunk: dict[str, Any]) -> bytes:
    return b"data: " + json_bytes(chunk) + b"\n\n"

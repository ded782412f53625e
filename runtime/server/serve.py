"""Runs the application: one process, and signals that let running answers end."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from rk_export.errors import InputError, RkExportError
from rk_export.runtime.server.context import Context
from rk_export.runtime.server.logs import event, log_as_json, logger

_BACKLOG = 2048
_LAST_SECONDS = 2  # for connections to close when no request runs any more


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens, so that a port in use is told before models are opened.

    Raises:
        InputError: The address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise InputError(
            f"cannot listen: {reason}", where=f"{host}:{port}", fix="give another --port"
        ) from error
    return listener


def run(app: FastAPI, listener: socket.socket, announce: Callable[[], None]) -> None:
    """Serve until a signal comes; a second one ends the process at once, with 128 and its number.

    Args:
        app: From `create_app`.
        listener: From `listen`; it is closed in the end.
        announce: Called when requests are answered.

    Raises:
        RkExportError: A model cannot be opened.
    """
    log_as_json()
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_graceful_shutdown=_LAST_SECONDS,
    )
    server = Server(config, app.state.context, announce)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
    if server.failure is not None:
        raise server.failure


class Server(uvicorn.Server):
    """Ends in two steps: the first signal lets running answers end, the second does not.

    Args:
        config: Of uvicorn.
        context: The server's.
        announce: Called when requests are answered.
    """

    def __init__(self, config: uvicorn.Config, context: Context, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self.failure: RkExportError | None = None
        self._context, self._announce = context, announce
        self._signalled = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen; the models are opened meanwhile."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._tasks = [asyncio.create_task(self._drained()), asyncio.create_task(self._opened())]

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal."""
        state = self._context.state
        if state.draining or self._loop is None:
            os._exit(128 + sig)  # nothing is half written: the server writes no files
        state.draining = True
        self._loop.call_soon_threadsafe(self._signalled.set)

    async def _opened(self) -> None:
        """Wait for the models, and say that they are there."""
        opening = self._context.state.opening
        assert opening is not None
        try:
            await asyncio.shield(opening)
        except RkExportError as error:
            self.failure, self.should_exit = error, True
            return
        except Exception as error:  # such as memory of a device that does not suffice
            logger.exception("a model cannot be opened")
            what = f"a model cannot be opened: {type(error).__name__}: {error}"
            self.failure = RkExportError(what, where="serve", fix="see the log for the cause")
            self.should_exit = True
            return
        self._announce()

    async def _drained(self) -> None:
        """Wait for a signal and then for the running answers, and end the server."""
        await self._signalled.wait()
        state, settings = self._context.state, self._context.settings
        event("draining", running=state.running, grace=settings.grace)
        loop = asyncio.get_running_loop()
        end = loop.time() + settings.grace
        while state.running and loop.time() < end:
            await asyncio.sleep(0.02)
        if state.running:
            event("grace is over", running=state.running)
            await asyncio.to_thread(self._context.models.close, finish=False)
        self.should_exit = True

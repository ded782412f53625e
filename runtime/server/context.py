"""What every route needs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette.requests import Request

from rk_export.runtime.engine.records import EngineClosedError
from rk_export.runtime.server.metrics import Metrics
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.settings import ServerSettings


@dataclass
class ServerState:
    """Whether requests are taken, and how many are being answered.

    Args:
        ready: The models have been opened.
        draining: No new requests are taken.
        running: Requests that are being answered.
        opening: Opens the models; None before the start.
    """

    ready: bool = False
    draining: bool = False
    running: int = 0
    opening: asyncio.Task[None] | None = None

    @property
    def taking(self) -> bool:
        """Whether requests are taken."""
        return self.ready and not self.draining


@dataclass(frozen=True)
class Context:
    """One server.

    Args:
        settings: How it was started.
        models: Its models.
        metrics: Its figures.
        state: What it is doing.
    """

    settings: ServerSettings
    models: Models
    metrics: Metrics
    state: ServerState = field(default_factory=ServerState)

    def faulty(self) -> bool:
        """Return whether a fault ended the engine of an open model; a server that is told to end closes them itself."""
        return not self.state.draining and any(model.faulty for model in self.models.served.values())

    def ended_by_fault(self, error: Exception) -> bool:
        """Return whether an error tells of an engine that ended although nobody closed it."""
        return isinstance(error, EngineClosedError) and self.state.taking


def context_of(request: Request) -> Context:
    """Return the server of a request."""
    found: Context = request.app.state.context
    return found

"""Probes: whether the process has to be restarted, and whether requests are taken."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from rk_export.runtime.server.context import context_of
from rk_export.runtime.server.errors import JsonResponse


async def server_live(request: Request) -> Response:
    """Say whether the process can go on: an engine that a fault ended comes back only with a new process."""
    live = not context_of(request).faulty()
    return JsonResponse({"live": live}, 200 if live else 503)


async def server_ready(request: Request) -> Response:
    """Say whether requests are taken."""
    context = context_of(request)
    ready = context.state.taking and not context.faulty()
    return JsonResponse({"ready": ready}, 200 if ready else 503)


async def model_ready(request: Request) -> Response:
    """Say whether a model can be asked; one that is opened when it is named can."""
    context = context_of(request)
    model = context.models.of_version(request.path_params["model"], request.path_params.get("version"))
    ready = context.state.taking and not model.faulty
    return JsonResponse({"name": model.name, "ready": ready}, 200 if ready else 503)

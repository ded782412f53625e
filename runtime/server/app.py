"""The application: routes, and what every request passes before them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from rk_export.errors import RkExportError
from rk_export.manifest import library_versions
from rk_export.runtime.server import health, oip
from rk_export.runtime.server.body_types import BodyTypes
from rk_export.runtime.server.chat import create_chat_completion
from rk_export.runtime.server.completions import create_completion
from rk_export.runtime.server.context import Context, context_of
from rk_export.runtime.server.embeddings import create_embeddings
from rk_export.runtime.server.errors import ApiError, JsonResponse, failed, refused
from rk_export.runtime.server.generation import ClientGoneError, EngineFaultError
from rk_export.runtime.server.hosts import LocalHosts, is_local
from rk_export.runtime.server.limits import BodyLimit, Gate, Journal, logger
from rk_export.runtime.server.logs import request_id
from rk_export.runtime.server.metrics import CONTENT_TYPE, Metrics
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.oip_tensors import InferRequest
from rk_export.runtime.server.openai_types import ChatRequest, CompletionRequest, EmbeddingRequest
from rk_export.runtime.server.page import read_page
from rk_export.runtime.server.settings import ServerSettings

Handler = Callable[[Request], Awaitable[Response]]
_REFS = "#/components/schemas/{model}"
_INFER = "/v2/models/{model}/infer"
_BODIES: dict[str, type[BaseModel]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/embeddings": EmbeddingRequest,
    _INFER: InferRequest,
}


def create_app(models: Models, settings: ServerSettings, *, address: str | None = None) -> FastAPI:
    """Return the application of some models; they are opened when it starts and closed when it ends.

    Args:
        models: What is served.
        settings: How.
        address: Where the server listens, if it knows. At a loopback address and without keys, requests to names
            of other machines are refused.
    """
    context = Context(settings, models, Metrics(models))
    app = FastAPI(
        title="rk-export",
        version=library_versions().get("rk-export", "0"),
        docs_url=None,  # both pages would load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.context = context
    _add_routes(app)
    _add_handlers(app)
    # The last one that is added is the first that a request meets.
    app.add_middleware(BodyLimit, most=settings.max_body, seconds=settings.timeout)
    app.add_middleware(BodyTypes)
    app.add_middleware(Gate, context=context)
    if settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],  # clients send headers of their own, as OpenAI's does
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    if address is not None and is_local(address) and not settings.keys:
        app.add_middleware(LocalHosts)
    app.add_middleware(Journal, context=context)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    context: Context = app.state.context
    # Meanwhile the server answers probes.
    opening = context.state.opening = asyncio.create_task(_open(context))
    try:
        yield
    finally:
        await asyncio.gather(opening, return_exceptions=True)
        context.state.ready = False
        await asyncio.to_thread(context.models.close, finish=False)


async def _open(context: Context) -> None:
    await asyncio.to_thread(context.models.open_at_start)
    context.state.ready = True


def _add_routes(app: FastAPI) -> None:
    posts: dict[str, Handler] = {
        "/v1/completions": create_completion,
        "/v1/chat/completions": create_chat_completion,
        "/v1/embeddings": create_embeddings,
        _INFER: oip.infer,
        "/v2/models/{model}/versions/{version}/infer": oip.infer,
    }
    gets: dict[str, Handler] = {
        "/": chat_page,
        "/v1/models": list_models,
        "/v1/models/{model}": show_model,
        "/v2": oip.server_metadata,
        "/v2/health/live": health.server_live,
        "/v2/health/ready": health.server_ready,
        "/v2/models/{model}": oip.model_metadata,
        "/v2/models/{model}/versions/{version}": oip.model_metadata,
        "/v2/models/{model}/ready": health.model_ready,
        "/v2/models/{model}/versions/{version}/ready": health.model_ready,
        "/health/live": health.server_live,
        "/health/ready": health.server_ready,
        "/metrics": metrics,
    }
    for method, routes in (("POST", posts), ("GET", gets)):
        for path, handler in routes.items():
            app.add_api_route(path, handler, methods=[method], response_model=None)


async def list_models(request: Request) -> Response:
    """List the models."""
    served = context_of(request).models.served.values()
    return JsonResponse({"object": "list", "data": [model.entry() for model in served]})


async def show_model(request: Request) -> Response:
    """Show one model."""
    return JsonResponse(context_of(request).models.find(request.path_params["model"]).entry())


async def metrics(request: Request) -> Response:
    """Show the figures."""
    return Response(context_of(request).metrics.page(), headers={"Content-Type": CONTENT_TYPE})


async def chat_page(request: Request) -> Response:
    """Send the chat page."""
    page = read_page()
    if page is None:
        raise ApiError(404, "there is no page here; /openapi.json lists the routes")
    headers = {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": page.policy,
        "Referrer-Policy": "no-referrer",
    }
    return Response(page.body, headers=headers)


def _add_handlers(app: FastAPI) -> None:
    def of_api(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response(request.url.path)

    def of_runtime(request: Request, error: Exception) -> Response:
        assert isinstance(error, RkExportError)
        if context_of(request).ended_by_fault(error):  # the engine has logged the fault
            return failed(request_id.get()).response(request.url.path)
        return refused(error).response(request.url.path)

    def of_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        found = ApiError(error.status_code, str(error.detail), headers=error.headers)
        return found.response(request.url.path)

    def of_engine(request: Request, error: Exception) -> Response:
        logger.error("the engine failed", exc_info=error)
        return failed(request_id.get()).response(request.url.path)

    def of_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=499)

    app.add_exception_handler(ApiError, of_api)
    app.add_exception_handler(RkExportError, of_runtime)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(EngineFaultError, of_engine)
    app.add_exception_handler(ClientGoneError, of_gone)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the description of the routes, with the bodies that they read."""
    if app.openapi_schema is None:
        schema = FastAPI.openapi(app)
        kinds: list[Any] = [(kind, "validation") for kind in _BODIES.values()]
        _, definitions = models_json_schema(kinds, ref_template=_REFS)
        schema.setdefault("components", {})["schemas"] = definitions["$defs"]
        for path, kind in _BODIES.items():
            reference = {"$ref": _REFS.format(model=kind.__name__)}
            content = {"application/json": {"schema": reference}}
            schema["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        app.openapi_schema = schema
    return app.openapi_schema

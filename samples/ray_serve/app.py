"""Bundles behind Ray Serve, with the routes of ``rk-export serve``: a copy of this folder is a server for a cluster.

    pip install 'ray[serve]' 'rk-export[serve]'
    cd samples && serve run ray_serve.app:application small=/models/small large=/models/large

Every name in the command becomes a model of ``/v1/completions`` and ``/v1/chat/completions``. Its folder must lie under
the same path on every node.

A replica is a whole ``rk-export serve`` of one bundle, without the socket. The ingress reads nothing of a request but
the name of its model and whether the answer is streamed, so clients get what that server gives.

One deployment a bundle, rather than ``serve.multiplexed``: each model scales by its own load, and its replicas hold
it from their start. A multiplexed replica opens and drops bundles while requests run, so that one model's load slows
another's answers, and a crash loses the answers of both.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

from ray import serve
from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig
from ray.serve.exceptions import BackPressureError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from ray_serve.inside import Call, Head, Part, brings_text, parts_of
from ray_serve.repeat import LostAnswerError, Repeated
from rk_export.errors import InputError
from rk_export.runtime.engine import Counters, EngineOptions
from rk_export.runtime.providers import SessionSettings
from rk_export.runtime.server.app import create_app
from rk_export.runtime.server.errors import ApiError, JsonResponse, json_bytes, unavailable
from rk_export.runtime.server.models import Decoder, Models
from rk_export.runtime.server.reading import parse_object
from rk_export.runtime.server.settings import ServerSettings

DRAIN = 120  # seconds in which a replica that has to end finishes its answers; it takes no new ones
ATTEMPTS = "x-attempts"  # a response header: how many replicas the request was sent to
OWN_HEADERS = (b"content-length", b"x-request-id")  # of a replica's answer: Starlette and Ray set them anew

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Model:
    """One bundle and its replicas.

    Args:
        bundle: The folder, the same on every node.
        replicas: How many, by the requests that run or wait. Ray adds some while there are more than
            ``target_ongoing_requests`` a replica.
        slots: Requests that one replica decodes together.
        threads: Threads and declared CPUs of a replica.
        waiting: Requests that may wait at an ingress for a free slot; more are refused with status 429.
    """

    bundle: str
    replicas: AutoscalingConfig = field(
        default_factory=lambda: AutoscalingConfig(min_replicas=1, max_replicas=4, target_ongoing_requests=6)
    )
    slots: int = 8
    threads: int = 1
    waiting: int = 64

    @property
    def settings(self) -> ServerSettings:
        """How a replica opens its bundle, and what it refuses; API keys and limits belong here."""
        return ServerSettings(
            session=SessionSettings(threads=self.threads), engine=EngineOptions(slots=self.slots), grace=DRAIN
        )


class EngineEndedError(Exception):
    """The process of a replica lives, its engine does not."""


# What a caller sees of a replica whose process, node or engine has ended.
LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    ObjectLostError,
    ReplicaUnavailableError,
    EngineEndedError,
)


class Replica:
    """A process with one open bundle, its engine and its server."""

    def __init__(self, name: str, model: Model) -> None:
        self._name, self._models = name, Models({name: Path(model.bundle)}, model.settings)
        self._models.open_at_start()
        self._app = create_app(self._models, model.settings)
        self._app.state.context.state.ready = True  # the server's own start would open the bundle meanwhile

    async def answer(self, call: Call) -> AsyncGenerator[Part, None]:
        """Yield the parts of the answer to a request."""
        async with aclosing(parts_of(self._app, call)) as parts:
            async for part in parts:
                yield part

    async def check_health(self) -> None:
        """Raise where the engine has ended: Ray then starts another replica."""
        if (decoder := self._decoder) is not None:
            await decoder.engine.run(lambda: None)

    def counters(self) -> Counters:
        """Return what the engine of this replica did, for your own metrics."""
        return Counters() if self._decoder is None else self._decoder.engine.counters()

    @property
    def _decoder(self) -> Decoder | None:
        opened = self._models.served[self._name].opened
        return opened if isinstance(opened, Decoder) else None

    def __del__(self) -> None:
        """Close the bundle; Ray calls this when the last answer is finished, or the time for it is up."""
        if hasattr(self, "_app"):
            self._models.close(finish=False)


class Ingress:
    """Takes HTTP requests, sends each to a replica of its model, and repeats those whose replica dies."""

    def __init__(self, models: Mapping[str, DeploymentHandle]) -> None:
        self._models = {name: handle.options(stream=True) for name, handle in models.items()}

    async def __call__(self, request: Request) -> Response:
        """Answer a request."""
        path = request.url.path
        try:
            if (request.method, path) == ("GET", "/v1/models"):
                return JsonResponse({"object": "list", "data": [_entry(name) for name in self._models]})
            if request.method == "POST" and path.startswith("/v1/"):
                return await self._answer(request)
            raise ApiError(404, "there is no such route")
        except Exception as error:
            return explained(error).response(path)

    async def _answer(self, request: Request) -> Response:
        call = Call(request.method, request.url.path, tuple(request.headers.raw), await request.body())
        body = parse_object(call.body)
        replicas = self._models.get(str(body.get("model")))
        if replicas is None:
            raise ApiError(
                404, f"there is no model {body.get('model')!r}", param="model", code="model_not_found"
            )
        # Of an answer that is not streamed, nothing is sent before its end.
        streamed = body.get("stream") is True
        tries = Repeated(lambda: _attempt(replicas, call), LOST, brings_text if streamed else lambda _: False)
        parts = tries.parts()
        # The first part comes when the answer has begun or is whole: until then, a death costs nothing but time.
        head = await anext(parts)
        assert isinstance(head, Head)
        headers = {name.decode(): value.decode() for name, value in head.headers if name not in OWN_HEADERS}
        headers[ATTEMPTS] = str(tries.made)
        if streamed:
            return StreamingResponse(_sent(parts), head.status, headers)
        content = b"".join([part async for part in parts if isinstance(part, bytes)])
        return Response(content, head.status, headers)


async def _attempt(replicas: DeploymentHandle, call: Call) -> AsyncGenerator[Part, None]:
    """Send a request to one replica.

    Raises:
        EngineEndedError: The replica has no engine any more.
    """
    response = replicas.answer.remote(call)
    try:
        async for part in response:
            if isinstance(part, Head) and part.status == 503:
                raise EngineEndedError
            yield part
    finally:
        response.cancel()  # frees the slot where the client has left; nothing where the answer is whole


async def _sent(parts: AsyncGenerator[Part, None]) -> AsyncGenerator[bytes, None]:
    """Pass a stream on. One that breaks off ends with an event that says so, and without ``[DONE]``."""
    async with aclosing(parts):
        try:
            async for part in parts:
                if isinstance(part, bytes):
                    yield part
        except Exception as error:
            yield b"data: " + json_bytes(explained(error).body()) + b"\n\n"


def explained(error: Exception) -> ApiError:
    """Say to the client what has happened, and nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, LostAnswerError):
        return unavailable(f"{error.what}: {error.fix}", "replica_lost")
    if isinstance(error, BackPressureError):
        wait = {"retry-after": "1"}
        return ApiError(429, "too many requests: try again later", code="queue_full", headers=wait)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "an internal error", code="internal_error")


def build(models: Mapping[str, Model]) -> Application:
    """Return the application for ``serve.run``."""
    # An ingress that dies takes the requests with it that it forwards. It runs no model, so it has little to die of.
    ingress = serve.deployment(
        max_ongoing_requests=1000, graceful_shutdown_timeout_s=DRAIN, ray_actor_options={"num_cpus": 0}
    )
    replicas = {name: _deployment(name, model).bind(name, model) for name, model in models.items()}
    return ingress(Ingress).bind(replicas)


def _deployment(name: str, model: Model) -> Deployment:
    deployment = serve.deployment(
        name=f"model-{re.sub(r'[^A-Za-z0-9.-]', '-', name)}",
        autoscaling_config=model.replicas,
        max_ongoing_requests=model.slots,  # more would wait in a queue that dies with the replica
        max_queued_requests=model.waiting,
        graceful_shutdown_timeout_s=DRAIN,
        health_check_period_s=5,
        ray_actor_options={"num_cpus": model.threads},
    )
    return deployment(Replica)


def application(bundles: dict[str, str]) -> Application:
    """Build the application of a command line: ``serve run ray_serve.app:application NAME=FOLDER ...``.

    Raises:
        InputError: No bundle is given.
    """
    if not bundles:
        raise InputError("no bundle", where="serve run", fix="give NAME=FOLDER, once for each model")
    return build({name: Model(folder) for name, folder in bundles.items()})


def _entry(name: str) -> dict[str, object]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "rk-export"}

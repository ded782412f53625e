"""The Open Inference Protocol, version 2, over REST: text, and the logits or vectors of given tokens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from pydantic import ValidationError
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rk_export.manifest import library_versions
from rk_export.runtime.engine.records import Request
from rk_export.runtime.server.context import Context, context_of
from rk_export.runtime.server.encoders import EncoderWorker
from rk_export.runtime.server.errors import ApiError, JsonResponse, bad_request, timed_out
from rk_export.runtime.server.generation import Watch, check_count, room_for, submitted, unless_gone
from rk_export.runtime.server.models import Served
from rk_export.runtime.server.oip_tensors import HEADER, Inference, read_inference, write_inference
from rk_export.runtime.server.openai_types import Sampling
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.reading import misfit

EXTENSIONS = ["binary_tensor_data"]
_MOST_BYTES = 256 << 20  # of logits in one answer
_DEFAULT_TOKENS = 16
# Parameters of a text request; they mean what they mean in /v1/completions.
_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
)
_PARAMETERS = {*_SAMPLING, "all_positions", "binary_data_output"}
Outputs = dict[str, np.ndarray | list[str]]


async def server_metadata(request: HttpRequest) -> Response:
    """Say who answers."""
    version = library_versions().get("rk-export", "0")
    return JsonResponse({"name": "rk-export", "version": version, "extensions": EXTENSIONS})


async def server_live(request: HttpRequest) -> Response:
    """Say that the process answers."""
    return JsonResponse({"live": True})


async def server_ready(request: HttpRequest) -> Response:
    """Say whether requests are taken."""
    state = context_of(request).state
    ready = state.ready and not state.draining
    return JsonResponse({"ready": ready}, 200 if ready else 503)


async def model_metadata(request: HttpRequest) -> Response:
    """Say what a model takes and gives."""
    model = _model(request)
    tokens = [_tensor("input_ids", "INT64", [-1, -1]), _tensor("attention_mask", "INT64", [-1, -1])]
    gives = (
        [_tensor("embedding", "FP32", [-1, -1]), _tensor("last_hidden_state", "FP32", [-1, -1, -1])]
        if model.encoder
        else [_tensor("text", "BYTES", [-1]), _tensor("logits", "FP32", [-1, -1])]
    )
    return JsonResponse(
        {
            "name": model.name,
            "versions": ["1"],
            "platform": "onnxruntime_rk_export",
            "inputs": [_tensor("text", "BYTES", [-1]), *tokens],
            "outputs": gives,
        }
    )


async def model_ready(request: HttpRequest) -> Response:
    """Say whether a model can be asked; one that is opened when it is named can."""
    state = context_of(request).state
    ready = state.ready and not state.draining
    return JsonResponse({"name": _model(request).name, "ready": ready}, 200 if ready else 503)


async def infer(request: HttpRequest) -> Response:
    """Continue texts, or run the graph on given tokens."""
    context, model = context_of(request), _model(request)
    if "content-encoding" in request.headers:
        raise ApiError(415, "compressed bodies are not read", code="unsupported_media_type")
    asked = read_inference(await request.body(), request.headers.get(HEADER))
    if unknown := sorted(asked.asked.parameters.keys() - _PARAMETERS):
        raise bad_request(f"parameter {unknown[0]!r} is not known or not supported", unknown[0])
    with ExitStack() as stack:
        opened = await context.models.hold(model.name, stack)
        try:
            async with asyncio.timeout(context.settings.timeout):
                outputs = await unless_gone(request, _outputs(context, model.name, opened, asked))
        except TimeoutError as error:
            raise timed_out(context.settings.timeout) from error
    body, headers = await asyncio.to_thread(write_inference, asked.asked, model.name, outputs)
    return Response(body, headers=headers)


async def _outputs(context: Context, name: str, opened: Decoder | EncoderWorker, asked: Inference) -> Outputs:
    if set(asked.texts) == {"text"} and not asked.integers:
        texts = asked.texts["text"]
        if isinstance(opened, Decoder):
            return {"text": await _continued(context, name, opened, texts, asked)}
        codec = opened.session.text_codec
        return {"embedding": await opened.embed([codec.encode(text) for text in texts])}
    given = asked.integers
    if "input_ids" not in given or given.keys() - {"input_ids", "attention_mask"} or asked.texts:
        raise bad_request("give text, or input_ids and perhaps attention_mask", "inputs")
    rows, width = _rows(given["input_ids"], given.get("attention_mask"))
    if isinstance(opened, EncoderWorker):
        return await _hidden(opened, given["input_ids"], given.get("attention_mask"))
    whole = asked.asked.parameters.get("all_positions") is True
    return {"logits": await _logits(opened, rows, width, whole=whole)}


async def _continued(
    context: Context, name: str, decoder: Decoder, texts: list[str], asked: Inference
) -> list[str]:
    given = {key: value for key, value in asked.asked.parameters.items() if key in _SAMPLING}
    try:
        body = Sampling.model_validate({"model": name, **given})
    except ValidationError as error:
        raise misfit(error) from error
    check_count(len(texts), context.settings)
    codec = decoder.session.text_codec
    prompts = await asyncio.to_thread(lambda: [codec.encode(text) for text in texts])
    room = room_for(decoder, prompts, body.max_tokens, context.settings)
    options = body.options(room if body.max_tokens is not None else min(room, _DEFAULT_TOKENS), None)
    watch = Watch.start(name, context.metrics, context.settings)
    with submitted(decoder, [Request(tuple(prompt), options) for prompt in prompts], watch) as answers:
        return [answer.text for answer in await answers.all()]


def _rows(ids: np.ndarray, mask: np.ndarray | None) -> tuple[list[tuple[np.ndarray, int]], int]:
    """Return the tokens of each row with the place of the first one, and the width of all rows.

    Raises:
        ApiError: The arrays are no [batch, length], or a mask has a hole.
    """
    if ids.ndim != 2 or ids.size == 0:
        raise bad_request(f"shape {list(ids.shape)}, [batch, length] is wanted", "input_ids")
    if mask is None:
        mask = np.ones_like(ids)
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise bad_request("a mask of zeros and ones in the shape of input_ids is wanted", "attention_mask")
    found = []
    for row, marks in zip(ids, mask, strict=True):
        (places,) = np.nonzero(marks)
        if not len(places) or len(places) != places[-1] - places[0] + 1:
            raise bad_request("every row needs its ones side by side", "attention_mask")
        found.append((row[places], int(places[0])))
    return found, ids.shape[1]


async def _logits(
    decoder: Decoder, rows: list[tuple[np.ndarray, int]], width: int, *, whole: bool
) -> np.ndarray:
    """Return logits [batch, vocabulary] of the last tokens, or [batch, length, vocabulary] with zeros at padding.

    Every row runs alone, so that it is what it would be without the others.
    """
    session, found = decoder.session, []
    vocabulary = session.rows or 1
    size = len(rows) * (width if whole else 1) * vocabulary * 4
    if size > _MOST_BYTES:
        raise bad_request(
            f"{size} bytes of logits in one answer, at most {_MOST_BYTES} are given", "input_ids"
        )
    for tokens, first in rows:
        if len(tokens) > decoder.limit:
            raise bad_request(
                f"{len(tokens)} tokens do not fit into a context of {decoder.limit}",
                "input_ids",
                "context_length_exceeded",
            )
        logits = await decoder.engine.run(_prefill(decoder, tokens, whole))
        if whole:
            placed = np.zeros((width, logits.shape[1]), np.float32)
            placed[first : first + len(tokens)] = logits
            found.append(placed)
        else:
            found.append(logits[-1])
    return np.stack(found)


def _prefill(decoder: Decoder, tokens: np.ndarray, whole: bool) -> Callable[[], np.ndarray]:
    start = 0 if whole else len(tokens) - 1
    return lambda: decoder.session.prefill_logits(tokens[None], start=start)[0].astype(np.float32)


async def _hidden(worker: EncoderWorker, ids: np.ndarray, mask: np.ndarray | None) -> Outputs:
    hidden = await worker.run(lambda: worker.session.forward(ids, mask).astype(np.float32))
    return {"last_hidden_state": hidden}


def _model(request: HttpRequest) -> Served:
    version = request.path_params.get("version", "1")
    model = context_of(request).models.find(request.path_params["model"])
    if version != "1":
        raise ApiError(404, f"{model.name} has version 1 only", code="model_not_found")
    return model


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}

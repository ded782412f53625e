"""The Open Inference Protocol, version 2, over REST: text, and the logits or vectors of given tokens."""

from __future__ import annotations

import asyncio
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
from rk_export.runtime.server.errors import JsonResponse, bad_request, timed_out
from rk_export.runtime.server.generation import Watch, check_count, room_for, submitted, unless_gone
from rk_export.runtime.server.models import Served
from rk_export.runtime.server.oip_arrays import embeddings, hidden_state, logits, most_bytes, tokens_of
from rk_export.runtime.server.oip_tensors import (
    HEADER,
    Inference,
    check_outputs,
    read_inference,
    write_inference,
)
from rk_export.runtime.server.openai_types import Sampling
from rk_export.runtime.server.opened import Decoder
from rk_export.runtime.server.reading import misfit

EXTENSIONS = ["binary_tensor_data"]
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


async def server_metadata(request: HttpRequest) -> Response:
    """Say who answers."""
    version = library_versions().get("rk-export", "0")
    return JsonResponse({"name": "rk-export", "version": version, "extensions": EXTENSIONS})


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


async def infer(request: HttpRequest) -> Response:
    """Continue texts, or run the graph on given tokens."""
    context, model = context_of(request), _model(request)
    asked = await asyncio.to_thread(read_inference, await request.body(), request.headers.get(HEADER))
    if unknown := sorted(asked.asked.parameters.keys() - _PARAMETERS):
        raise bad_request(f"parameter {unknown[0]!r} is not known or not supported", unknown[0])
    output = _output(model, asked)
    check_outputs(asked.asked, output)
    with ExitStack() as stack:
        opened = await context.models.hold(model.name, stack)
        try:
            async with asyncio.timeout(context.settings.timeout):
                value = await unless_gone(request, _value(context, model.name, opened, asked))
        except TimeoutError as error:
            raise timed_out(context.settings.timeout) from error
    body, headers = await asyncio.to_thread(write_inference, asked.asked, model.name, output, value)
    return Response(body, headers=headers)


def _output(model: Served, asked: Inference) -> str:
    """Return the name of what a request's inputs give; it is one output in all cases."""
    if set(asked.texts) == {"text"} and not asked.integers:
        return "embedding" if model.encoder else "text"
    given = asked.integers
    if "input_ids" not in given or given.keys() - {"input_ids", "attention_mask"} or asked.texts:
        raise bad_request("give text, or input_ids and perhaps attention_mask", "inputs")
    return "last_hidden_state" if model.encoder else "logits"


async def _value(
    context: Context, name: str, opened: Decoder | EncoderWorker, asked: Inference
) -> np.ndarray | list[str]:
    most = most_bytes(asked.asked)
    if asked.texts:
        texts = asked.texts["text"]
        if isinstance(opened, Decoder):
            return await _continued(context, name, opened, texts, asked)
        return await embeddings(opened, texts, most)
    ids = asked.integers["input_ids"]
    mask = asked.integers.get("attention_mask", np.ones_like(ids))
    rows = await asyncio.to_thread(tokens_of, ids, mask)
    if isinstance(opened, EncoderWorker):
        return await hidden_state(opened, ids, mask, most)
    whole = asked.asked.parameters.get("all_positions") is True
    return await logits(opened, rows, ids.shape[1], most, whole=whole)


async def _continued(
    context: Context, name: str, decoder: Decoder, texts: list[str], asked: Inference
) -> list[str]:
    given = {key: value for key, value in asked.asked.parameters.items() if key in _SAMPLING}
    try:
        body = Sampling.model_validate(value := {"model": name, **given})
    except ValidationError as error:
        raise misfit(error, value) from error
    check_count(len(texts), decoder, context.settings)
    codec = decoder.session.text_codec
    prompts = await asyncio.to_thread(lambda: [codec.encode(text) for text in texts])
    room = room_for(decoder, prompts, body.max_tokens, context.settings)
    options = body.options(room if body.max_tokens is not None else min(room, _DEFAULT_TOKENS), None)
    watch = Watch.start(name, context.metrics, context.settings)
    with submitted(decoder, [Request(tuple(prompt), options) for prompt in prompts], watch) as answers:
        return [answer.text for answer in await answers.all()]


def _model(request: HttpRequest) -> Served:
    models = context_of(request).models
    return models.of_version(request.path_params["model"], request.path_params.get("version"))


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}

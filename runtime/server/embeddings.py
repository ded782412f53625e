"""``POST /v1/embeddings``: texts as vectors, by encoder bundles."""

from __future__ import annotations

import asyncio
import base64
from contextlib import ExitStack
from typing import Any

import numpy as np
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from rk_export.runtime.server.context import context_of
from rk_export.runtime.server.encoders import EncoderWorker
from rk_export.runtime.server.errors import JsonResponse, bad_request, timed_out
from rk_export.runtime.server.generation import unless_gone
from rk_export.runtime.server.openai_types import EmbeddingRequest
from rk_export.runtime.server.reading import read

_MOST_INPUTS = 2048  # as OpenAI allows


async def create_embeddings(request: HttpRequest) -> Response:
    """Return one vector for each text, scaled to length 1."""
    context = context_of(request)
    body = await read(request, EmbeddingRequest)
    with ExitStack() as stack:
        worker = await context.models.encoder(body.model, stack)
        rows = await asyncio.to_thread(_rows, body, worker)
        try:
            async with asyncio.timeout(context.settings.timeout):
                vectors = await unless_gone(request, worker.embed(rows))
        except TimeoutError as error:
            raise timed_out(context.settings.timeout) from error
    if body.dimensions is not None and body.dimensions != vectors.shape[1]:
        raise bad_request(f"this model gives {vectors.shape[1]} dimensions", "dimensions")
    return await asyncio.to_thread(_answer, body, rows, vectors)  # many numbers are written as text


def _answer(body: EmbeddingRequest, rows: list[list[int]], vectors: np.ndarray) -> Response:
    tokens = sum(map(len, rows))
    data = [_entry(index, vector, body.encoding_format) for index, vector in enumerate(vectors)]
    return JsonResponse(
        {
            "object": "list",
            "data": data,
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
    )


def _rows(body: EmbeddingRequest, worker: EncoderWorker) -> list[list[int]]:
    given: Any = body.input
    items = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not items or len(items) > _MOST_INPUTS:
        raise bad_request(f"{len(items)} inputs; give 1 to {_MOST_INPUTS}", "input")
    rows = [
        worker.session.tokens(item, body.prompt_name) if isinstance(item, str) else item for item in items
    ]
    for index, row in enumerate(rows):
        if (fix := worker.session.refusal(row)) is not None:
            raise bad_request(f"input {index} has {len(row)} tokens; {fix}", "input")
    return rows


def _entry(index: int, vector: np.ndarray, form: str | None) -> dict[str, Any]:
    little = vector.astype("<f4")
    value = base64.b64encode(little.tobytes()).decode() if form == "base64" else little.tolist()
    return {"object": "embedding", "index": index, "embedding": value}

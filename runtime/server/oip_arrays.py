"""Arrays that the Open Inference Protocol gives: logits and vectors, within a bound of their size."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np

from rk_export.runtime.server.encoders import EncoderWorker
from rk_export.runtime.server.errors import ApiError, bad_request
from rk_export.runtime.server.oip_tensors import InferRequest, wants_bytes
from rk_export.runtime.server.opened import Decoder

_FLOAT = 4
_MOST_BYTES = 256 << 20  # of float32 in one answer
_MOST_JSON_BYTES = _MOST_BYTES // 16  # the same as JSON, which takes far more memory while it is written


def most_bytes(asked: InferRequest) -> int:
    """Return the most bytes of float32 that an answer may hold."""
    return _MOST_BYTES if wants_bytes(asked) else _MOST_JSON_BYTES


def tokens_of(ids: np.ndarray, mask: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Return the tokens of each row, with the place of the first one.

    Args:
        ids: [batch, length].
        mask: The same, 0 at padding.

    Raises:
        ApiError: The arrays are no [batch, length], or a mask has a hole.
    """
    if ids.ndim != 2 or ids.size == 0:
        raise bad_request(f"shape {list(ids.shape)}, [batch, length] is wanted", "input_ids")
    if mask.shape != ids.shape or not np.isin(mask, (0, 1)).all():
        raise bad_request("a mask of zeros and ones in the shape of input_ids is wanted", "attention_mask")
    found = []
    for row, marks in zip(ids, mask, strict=True):
        (places,) = np.nonzero(marks)
        if not len(places) or len(places) != places[-1] - places[0] + 1:
            raise bad_request("every row needs its ones side by side", "attention_mask")
        found.append((row[places], int(places[0])))
    return found


async def logits(
    decoder: Decoder, rows: list[tuple[np.ndarray, int]], width: int, most: int, *, whole: bool
) -> np.ndarray:
    """Return logits [batch, vocabulary] of the last tokens, or [batch, length, vocabulary] with zeros at padding.

    Every row runs alone, so that it is what it would be without the others.

    Args:
        decoder: The model.
        rows: From `tokens_of`.
        width: The length of all rows with their padding.
        most: Bytes of the answer.
        whole: Whether all positions are wanted.

    Raises:
        ApiError: The answer would be too large, or a row does not fit into the context.
    """
    vocabulary = decoder.session.rows or 1
    _check_size(len(rows) * (width if whole else 1) * vocabulary, most, "input_ids")
    longest = max(len(tokens) for tokens, _ in rows)
    if longest > decoder.limit:
        raise bad_request(
            f"{longest} tokens do not fit into a context of {decoder.limit}",
            "input_ids",
            "context_length_exceeded",
        )
    found = []
    for tokens, first in rows:
        given = await decoder.engine.run(_prefill(decoder, tokens, whole))
        if whole:
            placed = np.zeros((width, given.shape[1]), np.float32)
            placed[first : first + len(tokens)] = given
            found.append(placed)
        else:
            found.append(given[-1])
    return np.stack(found)


def _prefill(decoder: Decoder, tokens: np.ndarray, whole: bool) -> Callable[[], np.ndarray]:
    start = 0 if whole else len(tokens) - 1
    return lambda: decoder.session.prefill_logits(tokens[None], start=start)[0].astype(np.float32)


async def embeddings(worker: EncoderWorker, texts: list[str], most: int) -> np.ndarray:
    """Return a unit vector for each text, float32 [texts, width].

    Raises:
        ApiError: The answer would be too large.
        InputError: There is no text, or one is empty or too long.
    """
    _check_size(len(texts) * await worker.width(), most, "text")
    tokens = worker.session.tokens
    return await worker.embed(await asyncio.to_thread(lambda: [tokens(text) for text in texts]))


async def hidden_state(worker: EncoderWorker, ids: np.ndarray, mask: np.ndarray, most: int) -> np.ndarray:
    """Return the last hidden state, float32 [batch, length, hidden].

    Raises:
        ApiError: The answer would be too large.
        InputError: A row is too long or has an unknown token.
    """
    _check_size(ids.size * await worker.hidden_width(), most, "input_ids")
    return await worker.hidden(ids, mask)


def _check_size(floats: int, most: int, param: str) -> None:
    if floats * _FLOAT > most:
        raise ApiError(
            400,
            f"{floats * _FLOAT} bytes of float32 in one answer, at most {most} are given;"
            f" as binary data at most {_MOST_BYTES}",
            param=param,
            code="answer_too_large",
        )

"""Probabilities of tokens in the forms of OpenAI's two interfaces."""

from __future__ import annotations

import math
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from rk_export.runtime.engine.records import TokenScore
from rk_export.runtime.server.opened import Decoder

_LEAST = -9999.0  # JSON has no infinity


def chat_logprobs(decoder: Decoder, scores: Sequence[TokenScore]) -> dict[str, Any]:
    """Return the ``logprobs`` of a chat's choice."""
    content = [
        {
            **_entry(decoder, score.token, score.logprob),
            "top_logprobs": [_entry(decoder, token, value) for token, value in score.top],
        }
        for score in scores
    ]
    return {"content": content, "refusal": None}


class Offsets:
    """Where the tokens of one answer begin in its text, in characters.

    Args:
        start: Characters of the text before the first token.
    """

    def __init__(self, start: int = 0) -> None:
        self._next, self._reader = start, getincrementaldecoder("utf-8")("replace")

    def take(self, decoder: Decoder, token: int) -> int:
        """Return where the next token begins: within a character, that is where the character begins."""
        found = self._next
        if not decoder.session.text_codec.hidden_text(token):  # a special token is not in the text
            self._next += len(self._reader.decode(token_bytes(decoder, token)))
        return found


def completion_logprobs(decoder: Decoder, scores: Sequence[TokenScore], offsets: Offsets) -> dict[str, Any]:
    """Return the ``logprobs`` of a completion's choice.

    Args:
        decoder: The model.
        scores: One for each token.
        offsets: Of this answer; the tokens before these have been taken.
    """
    top = [
        {token_text(decoder, token): _finite(value) for token, value in reversed(score.top)}
        for score in scores
    ]
    return {
        "tokens": [token_text(decoder, score.token) for score in scores],
        "token_logprobs": [_finite(score.logprob) for score in scores],
        "top_logprobs": top if any(score.top for score in scores) else None,
        "text_offset": [offsets.take(decoder, score.token) for score in scores],
    }


def token_text(decoder: Decoder, token: int) -> str:
    """Return the text of one token; bytes that are no whole character are shown as such."""
    raw = token_bytes(decoder, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def token_bytes(decoder: Decoder, token: int) -> bytes:
    """Return the bytes of a token; those of its name for a special one."""
    codec = decoder.session.text_codec
    special = codec.hidden_text(token)
    if special or codec.token_text(token) is None:
        return special.encode()
    tokens = decoder.byte_tokens
    return codec.decode([token]).encode() if tokens is None else tokens.bytes_of(token)


def _entry(decoder: Decoder, token: int, value: float) -> dict[str, Any]:
    raw = token_bytes(decoder, token)
    return {"token": token_text(decoder, token), "logprob": _finite(value), "bytes": list(raw)}


def _finite(value: float) -> float:
    return max(float(value), _LEAST) if not math.isnan(value) else _LEAST

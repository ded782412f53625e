"""Log likelihood of continuations: the sum over their tokens, each given all tokens before it.

Rows of one batch are padded on the right: in a causal model no token sees the padding after it, so no mask is needed,
and the same function serves PyTorch and ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rk_export.errors import InputError
from rk_export.evaluation.perplexity import as_numpy, token_nll
from rk_export.progress import stage
from rk_export.runtime.text import TextCodec
from rk_export.runtime.token_gate import TokenGate
from rk_export.text import LogitsFn

BATCH_TOKENS = 512  # padded tokens a batch: logits of a vocabulary of 256k then take half a gigabyte


@dataclass(frozen=True)
class Continuation:
    """Tokens to be scored after others.

    Args:
        context: What the model reads first, at least one token.
        tokens: What is scored, at least one token.
    """

    context: tuple[int, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """How a model takes a continuation.

    Args:
        log_likelihood: Of all its tokens together, in nats.
        greedy: Whether each of its tokens is the likeliest in its place.
    """

    log_likelihood: float
    greedy: bool


class PairEncoder:
    """Encodes context and continuation together and parts the tokens where the context's end.

    The special tokens that the tokenizer puts in front of a text (a beginning-of-sequence token, where the model was
    trained with one) come first; those it puts at the end are left out. Spaces at the end of a context go to the
    continuation, whose first token usually begins with one.

    Args:
        codec: The model's tokenizer.
        rows: Rows of the model's embedding; None looks at no id.
    """

    def __init__(self, codec: TextCodec, rows: int | None = None) -> None:
        self._codec = codec
        self._gate = TokenGate(rows, text_of=codec.token_text)
        self.prefix = _front_tokens(codec)

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the tokens of a text, without special tokens.

        Raises:
            InputError: The model knows no row for one of them.
        """
        tokens = tuple(self._codec.encode(text, special_tokens=False))
        if tokens:
            self._gate.check(tokens, where=repr(text))
        return tokens

    def with_prefix(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tokens after the special ones in front, unless they, from a chat template, are there already."""
        return tokens if tokens[: len(self.prefix)] == self.prefix else self.prefix + tokens

    def pair(self, context: str, continuation: str) -> Continuation:
        """Return the tokens to read and those to score.

        Raises:
            InputError: One of the two is left without tokens.
        """
        read = self.encode(context.rstrip())
        result = Continuation(self.with_prefix(read), self.encode(context + continuation)[len(read) :])
        if not result.context or not result.tokens:
            raise InputError(
                "is no token of its own beside its context", where=repr(continuation), fix="change the item"
            )
        return result


def _front_tokens(codec: TextCodec) -> tuple[int, ...]:
    """Return the special tokens that come before a text."""
    plain, special = codec.encode("a", special_tokens=False), codec.encode("a")
    starts = range(len(special) - len(plain) + 1)
    start = next((start for start in starts if special[start : start + len(plain)] == plain), 0)
    return tuple(special[:start])


def log_likelihoods(
    logits_fn: LogitsFn,
    continuations: Sequence[Continuation],
    *,
    max_length: int,
    rotary_switch: int | None = None,
    title: str = "continuations",
) -> list[Likelihood]:
    """Score continuations, in order.

    Inputs that occur twice are computed once: choices of one token share their context. Rows of similar length run
    together.

    Args:
        logits_fn: Maps int64 ids (batch, length) to float logits (batch, length, vocab), NumPy or torch; logits at t
            predict token t + 1. The model is causal.
        continuations: What to score.
        max_length: Most tokens that the model takes; a longer context loses its beginning.
        rotary_switch: Longest sequence under LongRoPE's short factors: rows on its two sides do not run together.
        title: What is scored, for the progress.

    Raises:
        InputError: A continuation alone is longer than `max_length`, or logits are not finite or of another shape.
    """
    rows = _rows(continuations, max_length)
    found: dict[int, Likelihood] = {}
    with stage(title, len(rows)) as bar:
        for batch in _batches(list(rows), rotary_switch or 0):
            logits = _batch_logits(logits_fn, batch)
            for row, ids in zip(logits, batch, strict=True):
                for index in rows[ids]:
                    tokens = np.array(continuations[index].tokens)
                    found[index] = _score(row[len(ids) - len(tokens) : len(ids)], tokens)
            bar.advance(len(batch))
    return [found[index] for index in range(len(continuations))]


def _rows(continuations: Sequence[Continuation], max_length: int) -> dict[tuple[int, ...], list[int]]:
    """Return what the model reads, with the continuations that it is read for.

    The last token of a continuation is left out: nobody asks what follows it.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, one in enumerate(continuations):
        if len(one.tokens) > max_length:
            raise InputError(
                f"a continuation of {len(one.tokens)} tokens is longer than the model's context of {max_length}",
                fix="shorten the choice",
            )
        rows.setdefault((one.context + one.tokens)[:-1][-max_length:], []).append(index)
    return rows


def _batches(rows: list[tuple[int, ...]], switch: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield the rows, the longest first, in batches of at most `BATCH_TOKENS` padded tokens (or of one row).

    A batch holds rows of more than ``switch`` tokens, or others.
    """
    rows = sorted(rows, key=len, reverse=True)
    longer = sum(len(row) > switch for row in rows)
    begin = 0
    while begin < len(rows):
        end = begin + max(1, BATCH_TOKENS // len(rows[begin]))
        if begin < longer:
            end = min(end, longer)
        yield rows[begin:end]
        begin = end


def _batch_logits(logits_fn: LogitsFn, batch: list[tuple[int, ...]]) -> np.ndarray:
    """Return the logits (batch, length, vocab) of rows padded on the right with token 0."""
    ids = np.zeros((len(batch), len(batch[0])), np.int64)
    for row, tokens in zip(ids, batch, strict=True):
        row[: len(tokens)] = tokens
    logits = as_numpy(logits_fn(ids))
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise InputError(
            f"logits have shape {logits.shape}, expected {(*ids.shape, 'vocab')}", where="logits_fn"
        )
    return logits


def _score(logits: np.ndarray, tokens: np.ndarray) -> Likelihood:
    """Score tokens (n,) under logits (n, vocab)."""
    if tokens.max() >= logits.shape[-1]:
        raise InputError(
            f"token id {tokens.max()} is outside the vocabulary of {logits.shape[-1]}",
            where="tokenizer.json",
            fix="use the tokenizer of this model",
        )
    total = -token_nll(logits, tokens)
    if not math.isfinite(total):
        raise InputError(
            "the model's logits are not finite", where="logits_fn", fix="verify the model's weights"
        )
    return Likelihood(total, bool((logits.argmax(axis=-1) == tokens).all()))

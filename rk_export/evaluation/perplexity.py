"""Perplexity of a causal language model on a text: one protocol for PyTorch and ONNX Runtime.

The token sequence is cut into windows that do not overlap, without a beginning-of-sequence token; inside a
window every token but the first is predicted from the ones before it. The last window may be shorter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rk_export.errors import InputError
from rk_export.progress import track
from rk_export.text import LogitsFn

_ROWS = 128  # rows of logits turned to float64 at a time


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity and what it was computed from.

    Args:
        perplexity: exp(nll).
        nll: Mean negative log likelihood per predicted token, in nats.
        standard_error: Standard error of ``nll`` over the windows; NaN for a single window.
        perplexity_error: Standard error of ``perplexity``, to first order: perplexity times `standard_error`.
        tokens: Predicted tokens.
        windows: Windows evaluated.
        context: Tokens per full window.
        window_losses: Summed negative log likelihood of each window, for paired comparisons.
        window_tokens: Predicted tokens of each window.
    """

    perplexity: float
    nll: float
    standard_error: float
    perplexity_error: float
    tokens: int
    windows: int
    context: int
    window_losses: tuple[float, ...] = field(default=(), repr=False)
    window_tokens: tuple[int, ...] = field(default=(), repr=False)


def perplexity(
    logits_fn: LogitsFn, token_ids: np.ndarray, *, context: int = 512, limit: int | None = None
) -> PerplexityResult:
    """Measure perplexity over non-overlapping windows.

    Args:
        logits_fn: Maps int64 ids (1, length) to float logits (1, length, vocab), NumPy or torch; logits at t
            predict token t + 1.
        token_ids: int (tokens,), the whole text without special tokens.
        context: Tokens per window.
        limit: Use the first ``limit`` tokens only.

    Raises:
        InputError: Fewer than two tokens, a context below two, or logits not finite or of another shape.
    """
    if context < 2:
        raise InputError(f"a context of {context} predicts nothing", where="context", fix="give at least 2")
    if limit is not None and limit < 2:
        raise InputError(f"a limit of {limit} tokens predicts nothing", where="limit", fix="give at least 2")
    ids = np.asarray(token_ids, dtype=np.int64).reshape(-1)[:limit]
    if ids.size < 2:
        raise InputError(f"the text has {ids.size} tokens; at least 2 are needed", fix="give a longer text")
    sums, counts = [], []
    for window in track(list(_windows(ids, context)), "windows of text"):
        nll = _window_nll(logits_fn, window)
        sums.append(nll)
        counts.append(window.size - 1)
    return _summarize(np.array(sums), np.array(counts), context)


def _windows(ids: np.ndarray, context: int) -> Iterator[np.ndarray]:
    """Yield windows of ``context`` tokens; a rest of one token predicts nothing and is dropped."""
    for begin in range(0, ids.size - 1, context):
        yield ids[begin : begin + context]


def _window_nll(logits_fn: LogitsFn, window: np.ndarray) -> float:
    """Return the summed negative log likelihood of tokens 1.. of one window (length,)."""
    logits = as_numpy(logits_fn(window[None]))
    if logits.ndim != 3 or logits.shape[:2] != (1, window.size):
        raise InputError(
            f"logits have shape {logits.shape}, expected (1, {window.size}, vocab)", where="logits_fn"
        )
    if window.max() >= logits.shape[-1]:
        raise InputError(
            f"token id {window.max()} is outside the vocabulary of {logits.shape[-1]}",
            where="token_ids",
            fix="use the tokenizer of this model",
        )
    total = math.fsum(
        token_nll(
            logits[0, begin : begin + _ROWS][: window.size - 1 - begin], window[begin + 1 : begin + 1 + _ROWS]
        )
        for begin in range(0, window.size - 1, _ROWS)
    )
    if not math.isfinite(total):
        raise InputError(
            "the model's logits are not finite", where="logits_fn", fix="verify the model's weights"
        )
    return total


def token_nll(logits: np.ndarray, targets: np.ndarray) -> float:
    """Return the summed negative log likelihood of ``targets`` (rows,) under ``logits`` (rows, vocab)."""
    rows = logits.astype(np.float64)
    top = rows.max(axis=-1)  # (rows,)
    log_norm = top + np.log(np.exp(rows - top[:, None]).sum(axis=-1))
    return float((log_norm - rows[np.arange(len(targets)), targets]).sum())


def as_numpy(logits: Any) -> np.ndarray:
    """Return NumPy logits; torch's bfloat16 goes through float32, which NumPy knows."""
    if isinstance(logits, np.ndarray):
        return logits
    return np.asarray(logits.detach().float().cpu().numpy())


def _summarize(sums: np.ndarray, counts: np.ndarray, context: int) -> PerplexityResult:
    nll = float(sums.sum() / counts.sum())
    windows = len(sums)
    error = math.nan
    if windows > 1:  # ratio estimator: windows weigh as many tokens as they predict
        spread = sums - nll * counts
        error = math.sqrt(float((spread**2).sum()) * windows / (windows - 1)) / float(counts.sum())
    try:
        value = math.exp(nll)
    except OverflowError:
        value = math.inf
    paired = tuple(map(float, sums)), tuple(map(int, counts))
    return PerplexityResult(value, nll, error, value * error, int(counts.sum()), windows, context, *paired)


def paired_perplexity(mine: PerplexityResult, theirs: PerplexityResult) -> tuple[float, float] | None:
    """Return the difference of two perplexities on the same windows, and its standard error to first order.

    Both models find the same windows hard, so the error is below those of the two. It is NaN for a single window.

    Args:
        mine: The perplexity.
        theirs: What is taken from it.

    Returns:
        None where the windows differ, as under two tokenizers.
    """
    if mine.window_tokens != theirs.window_tokens or not mine.window_tokens:
        return None
    counts = np.array(mine.window_tokens)
    moved = np.zeros(len(counts))
    for sign, one in ((1.0, mine), (-1.0, theirs)):
        moved += sign * one.perplexity * (np.array(one.window_losses) - one.nll * counts)
    error = math.nan
    if (windows := len(counts)) > 1:
        error = math.sqrt(float((moved**2).sum()) * windows / (windows - 1)) / float(counts.sum())
    return mine.perplexity - theirs.perplexity, error

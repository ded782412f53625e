"""Chooses the next token of one row, with the same steps in the same order as Hugging Face ``generate``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rk_export.runtime.options import GenerationOptions


class Sampler:
    """Turns the logits of a row into its next token.

    Args:
        options: How to choose.
        prompt: The row's prompt tokens; the repetition penalty covers them.
        row: Index in the batch; rows draw from different streams of the same seed.
    """

    def __init__(self, options: GenerationOptions, prompt: Sequence[int], row: int = 0) -> None:
        self._options = options
        self._seen = set(prompt)
        entropy = None if options.seed is None else [options.seed, row]
        self._rng = np.random.default_rng(entropy)

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token and remember it.

        Args:
            logits: [vocabulary], float32; not changed.
        """
        options = self._options
        if options.repetition_penalty != 1:
            logits = penalize(logits, self._seen, options.repetition_penalty)
        token = int(logits.argmax()) if options.greedy else self._draw(logits)
        self._seen.add(token)
        return token

    def _draw(self, logits: np.ndarray) -> int:
        tokens, probabilities = candidates(logits, self._options)
        cumulative = probabilities.cumsum()
        index = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        return int(tokens[min(index, len(tokens) - 1)])


def penalize(logits: np.ndarray, seen: set[int], penalty: float) -> np.ndarray:
    """Divide the positive scores of seen tokens, multiply the negative ones (arXiv:1909.05858)."""
    tokens = np.fromiter(seen, np.int64, len(seen))
    scores = logits[tokens]
    lowered = logits.copy()
    lowered[tokens] = np.where(scores < 0, scores * penalty, scores / penalty)
    return lowered


def candidates(logits: np.ndarray, options: GenerationOptions) -> tuple[np.ndarray, np.ndarray]:
    """Apply temperature, top-k and top-p (arXiv:1904.09751).

    Returns:
        The tokens that may be drawn, likeliest first, and their probabilities, which sum to 1.
    """
    scores = logits.astype(np.float64) / options.temperature
    tokens = _top_k(scores, options.top_k)
    tokens = tokens[np.argsort(-scores[tokens], kind="stable")]
    probabilities = np.exp(scores[tokens] - scores[tokens[0]])
    probabilities /= probabilities.sum()
    if options.top_p < 1:
        before = probabilities.cumsum() - probabilities
        kept = max(1, int(np.count_nonzero(before < options.top_p)))
        tokens, probabilities = tokens[:kept], probabilities[:kept] / probabilities[:kept].sum()
    return tokens, probabilities


def _top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the tokens whose score is at least the k-th highest; ties are kept."""
    if k == 0 or k >= len(scores):
        return np.arange(len(scores))
    threshold = np.partition(scores, -k)[-k]
    return np.flatnonzero(scores >= threshold)

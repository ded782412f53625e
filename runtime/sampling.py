"""Chooses the next token of one row, with the same steps in the same order as Hugging Face ``generate``.

Nothing is sorted, and nothing as long as the vocabulary is allocated for a token: at 262,144 entries either takes
longer than many a model takes for the token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.options import GenerationOptions

_BLOCK = 512  # weights that are summed first when a token is drawn
_GROUPS = 1024  # whose maxima bound the k-th highest score from below; at least four times k
_LEAST, _MOST = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))


class Sampler:
    """Turns the logits of a row into its next token.

    Args:
        options: How to choose.
        prompt: The row's prompt tokens; the repetition penalty covers them.
        row: Index in the batch; rows draw from different streams of the same seed.
    """

    def __init__(self, options: GenerationOptions, prompt: Sequence[int], row: int = 0) -> None:
        self._options = options
        self._seen = np.unique(np.asarray(prompt, np.int64))
        entropy = None if options.seed is None else [options.seed, row]
        self._rng = np.random.default_rng(entropy)
        self._scores = self._weights = self._proposed = np.empty(0, np.float32)

    def choose(self, logits: np.ndarray) -> int:
        """Return the next token and remember it.

        Args:
            logits: [vocabulary], float32; not changed.

        Raises:
            InputError: The highest logit is no finite number, so that no token is likelier than another.
        """
        options = self._options
        if len(self._weights) != len(logits):
            self._scores, self._weights, self._proposed = np.empty((3, len(logits)), np.float32)
        penalized = options.repetition_penalty != 1
        if penalized:
            logits = penalize(logits, self._seen, options.repetition_penalty, self._scores)
        likeliest = int(logits.argmax())  # the first NaN, where there is one
        if not np.isfinite(logits[likeliest]):
            raise InputError(
                f"no token can be chosen: the highest logit is {logits[likeliest]}",
                where="the model's logits",
                fix="run `rk-export verify` on the bundle; fp16 may have overflowed",
            )
        token = likeliest if options.greedy else self._sample(logits)
        if penalized and token not in self._seen:
            self._seen = np.append(self._seen, token)
        return token

    def _sample(self, logits: np.ndarray) -> int:
        options = self._options
        weights = token_weights(logits, options, self._weights)
        proposed = above_share(weights, options.min_p, self._proposed)
        if options.top_p == 1:
            return draw(proposed, self._rng.random())
        # Drawing until the nucleus is hit draws from the nucleus; it lies wholly before a token that is not in it.
        target = options.top_p * float(weights.sum())
        while True:
            token = draw(proposed, self._rng.random())
            before = ranked_before(weights, token, self._proposed)
            if float(before.sum()) < target:
                return token
            proposed = above_share(before, options.min_p, self._proposed)


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float, out: np.ndarray) -> np.ndarray:
    """Divide the positive scores of seen tokens, multiply the negative ones (arXiv:1909.05858).

    Args:
        logits: [vocabulary].
        seen: Tokens, none twice.
        penalty: The divisor.
        out: Receives the result, as all arguments of this name here.
    """
    scores = logits[seen].astype(np.float64)
    np.copyto(out, logits)
    with np.errstate(over="ignore"):
        scores = np.where(scores < 0, scores * penalty, scores / penalty)
    # A penalty of another order of size than the scores moves them to the end of the range, not beyond it.
    out[seen] = np.where(np.isfinite(logits[seen]), scores.clip(-_MOST, _MOST), logits[seen])
    return out


def token_weights(logits: np.ndarray, options: GenerationOptions, out: np.ndarray) -> np.ndarray:
    """Apply temperature and top-k.

    Args:
        logits: [vocabulary], float32, the highest finite; -inf is never drawn.
        options: A temperature above 0, and how many tokens to keep.
        out: Receives the result.

    Returns:
        [vocabulary], float32: the probability of each token over that of the likeliest, 0 where it is left out.
    """
    np.subtract(logits, logits.max(), out=out)
    with np.errstate(over="ignore"):  # at a low temperature: -inf weighs nothing
        np.divide(out, np.float32(min(max(options.temperature, _LEAST), _MOST)), out=out)
    np.exp(out, out=out)
    if 0 < options.top_k < len(logits):
        np.multiply(out, logits >= kth_highest(logits, options.top_k), out=out)
    return out


def kth_highest(scores: np.ndarray, k: int) -> float:
    """Return the k-th highest score; selection runs over the few scores that can be it.

    The scores are dealt into groups. The k highest maxima of groups are k scores, so the k-th highest score is
    none below them.

    Args:
        scores: [tokens].
        k: 1 to the number of scores.
    """
    groups = max(_GROUPS, 4 * k)
    deals = len(scores) // groups
    if deals < 2:
        return float(np.partition(scores, -k)[-k])
    maxima = scores[: deals * groups].reshape(deals, groups).max(axis=0)
    bound = np.partition(maxima, -k)[-k]
    above = scores[scores > bound]
    return float(bound if len(above) < k else np.partition(above, -k)[-k])


def above_share(weights: np.ndarray, share: float, out: np.ndarray) -> np.ndarray:
    """Return the weights, 0 where they are below a share of 1, the likeliest token's (min-p, arXiv:2407.01082)."""
    return weights if share == 0 else np.multiply(weights, weights >= share, out=out)


def ranked_before(weights: np.ndarray, token: int, out: np.ndarray) -> np.ndarray:
    """Return the weights, 0 for a token and all that rank after it.

    Top-p (arXiv:1904.09751) keeps a token unless those before it have the wanted mass. Of equal weights the higher
    index ranks first, as in a stable ascending sort, which is what Hugging Face ranks by.
    """
    weight = weights[token]
    np.multiply(weights, weights > weight, out=out)
    out[token + 1 :][weights[token + 1 :] == weight] = weight
    return out


def draw(weights: np.ndarray, quantile: float) -> int:
    """Return the token at a quantile of the distribution.

    Args:
        weights: [tokens], float32, not negative, their largest above 0; need not sum to 1.
        quantile: In [0, 1), uniform where tokens are to follow the weights.
    """
    blocks = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK)).cumsum(dtype=np.float64)
    block = int(np.searchsorted(blocks, quantile * blocks[-1], side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    start = blocks[block - 1] if block else 0.0
    # Sums of float32 are rounded: what is left of the quantile is scaled to the exact sum of the block.
    rest = (quantile * blocks[-1] - start) / (blocks[block] - start) * inside[-1]
    last = int(np.searchsorted(inside, inside[-1]))  # the last token of the block that weighs anything
    return block * _BLOCK + min(int(np.searchsorted(inside, rest, side="right")), last)

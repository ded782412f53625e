"""One row of a generation: chooses its tokens, turns them into text and knows when it ends."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from rk_export.runtime.engine.records import Constraint, TokenScore
from rk_export.runtime.options import FinishReason, Generation, GenerationOptions
from rk_export.runtime.sampling import Sampler
from rk_export.runtime.text import StopMatcher, TextCodec, TextStream


class Row:
    """One prompt and its continuation.

    Args:
        prompt: Tokens of the prompt.
        options: How to choose tokens and when to end.
        codec: The tokenizer, or None where the bundle has none: the text then stays empty.
        eos_ids: Tokens that end the row, beside those that the options name.
        index: Place among the rows that share a seed.
        limit: Most new tokens; None takes what the options say.
        constraint: Which tokens may come next; None allows all.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        codec: TextCodec | None,
        eos_ids: frozenset[int],
        index: int = 0,
        *,
        limit: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self.prompt = prompt
        self.limit = options.max_new_tokens if limit is None else min(limit, options.max_new_tokens)
        self.tokens: list[int] = []
        self.scores: list[TokenScore] = []
        self.finish_reason: FinishReason | None = None
        self._sampler = Sampler(options, prompt, index)
        self._stream = None if codec is None else TextStream(codec)
        self._matcher = StopMatcher(options.stop)
        self._ends = dict.fromkeys(options.stop_token_ids, FinishReason.STOP)
        self._ends |= dict.fromkeys(eos_ids, FinishReason.EOS)
        self._codec, self._constraint, self._logprobs = codec, constraint, options.logprobs
        self._text = ""
        self._taken = 0  # characters already given out by new_text

    def advance(self, logits: np.ndarray) -> int:
        """Choose the next token from logits [vocabulary], and end the row where it is the last one."""
        token = self._choose(logits)
        self.tokens.append(token)
        special = "" if self._codec is None else self._codec.hidden_text(token)
        if token in self._ends:
            self._close(self._ends[token], special)
            return token
        self._show(special, shown=False)
        if self._stream is not None:
            self._show(self._stream.push(token))
        if self._matcher.stopped:
            self.finish_reason = FinishReason.STOP
        elif len(self.tokens) >= self.limit:
            self._close(FinishReason.LENGTH)
        return token

    def new_text(self) -> str:
        """Return the text that came since the last call."""
        piece = self._text[self._taken :]
        self._taken = len(self._text)
        return piece

    def result(self) -> Generation:
        """Return the finished generation."""
        return Generation(
            text=self._text,
            token_ids=tuple(self.tokens),
            finish_reason=self.finish_reason or FinishReason.LENGTH,
            prompt_tokens=len(self.prompt),
        )

    def _choose(self, logits: np.ndarray) -> int:
        if self._constraint is None:
            token = self._sampler.choose(logits)
        else:
            token = self._sampler.choose(self._constraint.mask(logits))
            self._constraint.accept(token)
        if self._logprobs is not None:
            self.scores.append(token_score(logits, token, self._logprobs))
        return token

    def _close(self, reason: FinishReason, special: str = "") -> None:
        """End the row; the text of the special token that ends it may complete a stop string."""
        if self._stream is not None:
            self._show(self._stream.flush())
        self._show(special, shown=False)
        self._text += self._matcher.flush()
        stopped = self._matcher.stopped and reason is not FinishReason.EOS
        self.finish_reason = FinishReason.STOP if stopped else reason

    def _show(self, piece: str, *, shown: bool = True) -> None:
        self._text += self._matcher.push(piece, shown=shown)


def token_score(logits: np.ndarray, token: int, count: int) -> TokenScore:
    """Return the log-probability of a token and of the likeliest ones, from logits [vocabulary]."""
    highest = float(logits.max())
    total = highest + math.log(float(np.exp(logits - highest).sum(dtype=np.float64)))
    count = min(count, len(logits))
    likeliest = np.argpartition(logits, -count)[-count:] if count else np.empty(0, np.int64)
    ranked = sorted(likeliest.tolist(), key=lambda index: (-logits[index], index))
    top = tuple((index, float(logits[index]) - total) for index in ranked)
    return TokenScore(token, float(logits[token]) - total, top)

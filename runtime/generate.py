"""The generation loop: rows of a batch advance together until each has met its end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from rk_export.runtime.decoder import Decoder
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
        index: Place in the batch.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        options: GenerationOptions,
        codec: TextCodec | None,
        eos_ids: frozenset[int],
        index: int = 0,
    ) -> None:
        self.prompt = prompt
        self.new_tokens = options.max_new_tokens
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._sampler = Sampler(options, prompt, index)
        self._stream = None if codec is None else TextStream(codec)
        self._matcher = StopMatcher(options.stop)
        self._ends = dict.fromkeys(options.stop_token_ids, FinishReason.STOP)
        self._ends |= dict.fromkeys(eos_ids, FinishReason.EOS)
        self._codec = codec
        self._text = ""
        self._taken = 0  # characters already given out by new_text

    def advance(self, logits: np.ndarray) -> int:
        """Choose the next token from logits [vocabulary]; a finished row repeats its last token."""
        if self.finish_reason is not None:
            return self.tokens[-1]
        token = self._sampler.choose(logits)
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
        return token

    def finish(self, reason: FinishReason) -> None:
        """End the row and give out the text that was held back."""
        if self.finish_reason is None:
            self._close(reason)

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


def run_rows(decoder: Decoder, rows: Sequence[Row], budget: int) -> Iterator[None]:
    """Advance all rows together, yielding after each token, until all have ended.

    Args:
        decoder: Fresh, with room for the longest prompt and the budget.
        rows: The batch.
        budget: Most new tokens.
    """
    logits = decoder.prefill(*left_padded([row.prompt for row in rows]))
    for spent in range(1, budget + 1):
        tokens = np.array([row.advance(scores) for row, scores in zip(rows, logits, strict=True)])
        if spent == budget:
            for row in rows:
                row.finish(FinishReason.LENGTH)
        yield
        if all(row.finish_reason is not None for row in rows):
            return
        logits = decoder.step(tokens)


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids and mask, int64 [batch, longest]; shorter prompts are padded (mask 0) on the left."""
    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask

"""What a caller asks of a generation, and what comes back."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from numbers import Integral

from rk_export.errors import InputError


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and when generation ends.

    Scores pass through the same steps in the same order as in Hugging Face ``generate``: repetition penalty,
    temperature, top-k, top-p, min-p.

    Args:
        max_new_tokens: Most tokens to generate per prompt.
        temperature: Divides the logits before sampling; 0 chooses the likeliest token (greedy).
        top_k: Sample among the k likeliest tokens; 0 keeps all.
        top_p: Sample among the smallest set of tokens whose probability reaches p; 1 keeps all.
        min_p: Leave out tokens whose probability is below this share of the likeliest one's; 0 keeps all.
        repetition_penalty: Above 1 lowers the score of every token of the prompt and of the text so far.
        stop: Generation ends where one of these strings appears; the string itself is not returned. Special tokens
            count as their text here, though they are left out of what is returned: ``<|im_end|>`` is found.
        stop_token_ids: Tokens that end the generation beside those of the model; their text is not returned.
        seed: Seed of the random draws; the same seed gives the same text. None draws a fresh one.
        logprobs: So many of the likeliest tokens are reported for every token, beside the chosen one; 0 reports the
            chosen one alone, None nothing. The engine alone reports them.

    Raises:
        InputError: An option is out of its range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "give at least 1")
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "give 0 (greedy) or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "give 0 (all tokens) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "give a probability in (0, 1]")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "give a share in [0, 1]")
        _require(
            0 < self.repetition_penalty < math.inf,
            "repetition_penalty",
            self.repetition_penalty,
            "give 1 for no penalty",
        )
        _require(not isinstance(self.stop, str), "stop", self.stop, "give a tuple of strings")
        _require(all(self.stop), "stop", self.stop, "remove the empty string")
        fits = not isinstance(self.stop_token_ids, (Integral, str)) and all(
            map(_is_token, self.stop_token_ids)
        )
        _require(fits, "stop_token_ids", self.stop_token_ids, "give a tuple of token ids, 0 or more")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "give 0 or more")
        _require(self.logprobs is None or self.logprobs >= 0, "logprobs", self.logprobs, "give 0 or more")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken at every step."""
        return self.temperature == 0


class FinishReason(enum.StrEnum):
    """Why a generation ended.

    ``eos``: a token that the bundle names as an end, also where the caller named it too. ``stop``: a string or token
    that the caller named. ``length``: no tokens were left to spend.
    """

    EOS = "eos"
    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True)
class Generation:
    """One generated continuation.

    Args:
        text: The new text, without the prompt, special tokens and the stop string.
        token_ids: The new tokens, with the one that ended the text if there was one.
        finish_reason: End-of-sequence token, stop string or token, or no tokens left to spend.
        prompt_tokens: Length of the prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int


def _require(holds: bool, option: str, value: object, fix: str) -> None:
    if not holds:
        raise InputError(f"{value!r} is out of range", where=option, fix=fix)


def _is_token(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0

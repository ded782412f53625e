"""What is asked of the engine, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rk_export.errors import InputError, RkExportError
from rk_export.runtime.options import FinishReason, GenerationOptions

_GREEDY = GenerationOptions()


class QueueFullError(RkExportError):
    """As many requests wait as may; the caller should try again later."""


class EngineClosedError(RkExportError):
    """The engine takes no requests any more, or ended before it could finish this one."""


class EngineFaultError(RkExportError):
    """A step failed while it computed the request."""

    exit_code = 1


class CancelledRequestError(RkExportError):
    """The caller took the request back."""


class Constraint(Protocol):
    """Which tokens may come next in one answer, for example those that keep a JSON schema."""

    def mask(self, logits: np.ndarray) -> np.ndarray:
        """Return logits [vocabulary] with -inf for every token that may not come next; the argument stays as it is."""

    def accept(self, token: int) -> None:
        """Take note of the chosen token."""


@dataclass(frozen=True)
class Request:
    """One prompt to continue.

    Args:
        prompt: Its tokens.
        options: How to choose tokens and when to end.
        constraint: Which tokens may come next; of this request alone, for it has a state.
        sample: Number of the answer where one prompt gets several: they draw from different streams of one seed.
    """

    prompt: tuple[int, ...]
    options: GenerationOptions = _GREEDY
    constraint: Constraint | None = None
    sample: int = 0


@dataclass(frozen=True)
class TokenScore:
    """The logarithm of a token's probability under the model, before temperature and the other options.

    Args:
        token: The token that was chosen.
        logprob: Its natural logarithm of probability.
        top: The likeliest tokens with theirs, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What became certain since the piece before.

    Args:
        text: New text, empty while a character or a stop string may still be incomplete.
        token_ids: The tokens since then, those of special tokens included.
        scores: One for each token where the options ask for them.
    """

    text: str
    token_ids: tuple[int, ...]
    scores: tuple[TokenScore, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A finished request.

    Args:
        text: The new text, without special tokens and the stop string.
        token_ids: The new tokens, with the one that ended the text if there was one.
        finish_reason: Why it ended.
        prompt_tokens: Length of the prompt.
        cached_tokens: Tokens of the prompt that another request had computed.
        scores: One for each new token where the options ask for them.
        drafted_tokens: Tokens that were guessed ahead.
        accepted_tokens: Those of them that the model would have chosen itself.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = 0
    scores: tuple[TokenScore, ...] = ()
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class EngineOptions:
    """How many requests run together, and in which memory.

    Args:
        slots: Requests that are decoded together.
        queue: Requests that may wait beside them.
        chunk: Tokens of a prompt that are computed between two steps of the running answers: more of them end the
            prompt earlier, and hold the others up for longer. None takes as many as take the time of three steps.
        capacity: Most positions of prompt and answer together; None takes the session's limit.
        kept_prefixes: Finished requests whose keys and values are kept for prompts that begin alike; 0 keeps none.
        lookup: Guess that a text goes on as it did where its last tokens stood before. Requests then run one at a time.

    Raises:
        InputError: A number is out of its range.
    """

    slots: int = 8
    queue: int = 64
    chunk: int | None = None
    capacity: int | None = None
    kept_prefixes: int = 8
    lookup: bool = False

    def __post_init__(self) -> None:
        least = {"slots": 1, "queue": 0, "chunk": 1, "capacity": 2, "kept_prefixes": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise InputError(f"{value} is out of range", where=name, fix=f"give {lowest} or more")


@dataclass(frozen=True)
class Counters:
    """What an engine did since it was started.

    Args:
        running: Requests in slots now.
        waiting: Requests in the queue now.
        requests: Requests taken.
        refused: Requests refused because the queue was full.
        finished: Answers by the reason for which they ended; ``cancelled`` and ``failed`` are two of them.
        prompt_tokens: Tokens of all prompts.
        cached_tokens: Those that were copied instead of computed.
        new_tokens: Tokens of all answers.
        steps: Decoding steps of all slots together.
        drafted_tokens: Tokens guessed ahead.
        accepted_tokens: Those that the model would have chosen itself.
    """

    running: int = 0
    waiting: int = 0
    requests: int = 0
    refused: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

"""Guesses of the next tokens, which the model checks in one run: speculative decoding (arXiv:2211.17192).

The answer is the same with guesses and without; only the time differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.engine.prefixes import common
from rk_export.runtime.engine.rounding import LONGEST_CHECK
from rk_export.runtime.engine.slots import SlotRunner

_FIRST_GUESS = 4
_LONGEST_PATTERN = 3  # tokens at the end of a text that are looked for earlier in it
_MEMORY = 0.8  # what one check leaves of the share of accepted guesses before it
_TOO_FEW = 0.1  # below that share guesses cost more than they save
_PAUSE = 32  # tokens without guesses, where they did not pay
_CHUNK = 512


class Drafter(Protocol):
    """Guesses what a model will choose."""

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return guesses of the tokens that follow, at most ``room``; none where a guess would not pay."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many of the last guesses the model would have chosen."""


class GuessLength:
    """How many tokens to guess: more after guesses that were right, none for a while after many that were not."""

    def __init__(self) -> None:
        self._length, self._share, self._pause = _FIRST_GUESS, 1.0, 0

    def next(self, room: int) -> int:
        """Return how many tokens to guess now, at most ``room``."""
        if self._pause:
            self._pause -= 1
            return 0
        return max(0, min(self._length, room))

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many of the last guesses were right."""
        if not drafted:
            return
        self._share = _MEMORY * self._share + (1 - _MEMORY) * accepted / drafted
        longer = accepted == drafted
        self._length = min(LONGEST_CHECK - 1, 2 * self._length) if longer else max(2, accepted + 1)
        if self._share < _TOO_FEW:
            self._pause, self._share = _PAUSE, 0.5


class PromptLookup:
    """Guesses that a text goes on as it did where its last tokens stood before: names, quotations, edited code."""

    def __init__(self) -> None:
        self._length = GuessLength()

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return what followed the latest place of the last three tokens, or of the last two."""
        wanted = self._length.next(room)
        text = np.array(tokens, np.int64)
        for size in range(min(_LONGEST_PATTERN, len(text) - 1), 1, -1) if wanted else ():
            ends = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
            found = np.flatnonzero((ends == text[-size:]).all(axis=1))
            if len(found):
                begin = int(found[-1]) + size
                return [int(token) for token in text[begin : begin + wanted]]
        return []

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many of the last guesses were right."""
        self._length.learn(drafted, accepted)


class DraftModel:
    """Guesses what a smaller model of the same vocabulary would choose.

    Args:
        runner: Runs the smaller model over one slot.
        capacity: Positions of the slot.
        rows: Tokens below it have a row in both embeddings; nothing is guessed after another one.
    """

    def __init__(self, runner: SlotRunner, capacity: int, rows: int | None) -> None:
        self._runner, self._capacity, self._rows = runner, capacity, rows
        self._held = np.empty(0, np.int64)  # tokens whose keys and values the slot holds
        self._length = GuessLength()

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return the smaller model's likeliest tokens, one after another."""
        text = np.array(tokens, np.int64)
        wanted = self._length.next(min(room, self._capacity - len(text)))
        if not wanted or (self._rows is not None and int(text.max()) >= self._rows):
            return []
        logits = self._read(text)
        guesses: list[int] = []
        while True:
            guesses.append(int(logits[: self._rows].argmax()))
            if len(guesses) == wanted:
                return guesses
            logits = self._runner.step(0, np.array(guesses[-1:]), np.array([len(self._held)]))[0]
            self._held = np.append(self._held, guesses[-1])

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many of the last guesses were right."""
        self._length.learn(drafted, accepted)

    def _read(self, text: np.ndarray) -> np.ndarray:
        """Bring the slot up to a text; return the logits of its last token."""
        filled = min(common(self._held, text), len(text) - 1)
        logits = np.empty((0, 0), np.float32)
        for begin in range(filled, len(text), _CHUNK):
            logits = self._runner.extend(0, text[begin : begin + _CHUNK], begin)
        self._held = text
        last: np.ndarray = logits[-1]
        return last


def check_same_tokens(tokens: dict[str, int], others: dict[str, int], *, where: str) -> None:
    """Refuse a draft whose vocabulary is another one.

    Raises:
        InputError: A token differs.
    """
    if tokens != others:
        different = len(tokens.items() ^ others.items())
        raise InputError(
            f"{different} tokens of its vocabulary differ from those of the model",
            where=where,
            fix="give a bundle made of a model of the same family and tokenizer",
        )

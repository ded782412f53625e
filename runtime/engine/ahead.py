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
_MEMORY = 0.9  # what one timing leaves of the average before it
_TRIAL = 8  # runs with guesses before they are judged
_PAUSE = 64  # runs without guesses where they lost, before the next trial
_LOSS = 1.1  # guesses may take so much longer before they are called a loss: timings are noisy
_CHUNK = 512


class Drafter(Protocol):
    """Guesses what a model will choose."""

    def propose(self, tokens: Sequence[int], room: int) -> list[int]:
        """Return guesses of the tokens that follow, at most ``room``; none where a guess would not pay."""

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many of the last guesses the model would have chosen."""


class GuessLength:
    """How many tokens to guess: more after guesses that were right, fewer after others."""

    def __init__(self) -> None:
        self._length = _FIRST_GUESS

    def next(self, room: int) -> int:
        """Return how many tokens to guess now, at most ``room``."""
        return max(0, min(self._length, room))

    def learn(self, drafted: int, accepted: int) -> None:
        """Take note of how many of the last guesses were right."""
        if drafted:
            all_right = accepted == drafted
            self._length = min(LONGEST_CHECK - 1, 2 * self._length) if all_right else max(2, accepted + 1)


class Worth:
    """Whether guesses pay, by the time that a token takes with them and without; what loses is tried again at times."""

    def __init__(self) -> None:
        self._seconds: dict[bool, float] = {}  # of a token, with guesses and without
        self._trial = _TRIAL  # runs with guesses before they are judged
        self._pause = 0  # runs without guesses before the next trial

    def guess(self) -> bool:
        """Whether to guess now."""
        if False not in self._seconds:
            return False
        if self._pause:
            self._pause -= 1
            return False
        return True

    def note(self, guessed: bool, seconds: float, tokens: int) -> None:
        """Take note of a run that gave so many tokens, the time for making the guesses included."""
        now = seconds / tokens
        before = self._seconds.get(guessed, now)
        self._seconds[guessed] = _MEMORY * before + (1 - _MEMORY) * now
        if not guessed:
            return
        self._trial = max(0, self._trial - 1)
        if not self._trial and self._seconds[True] > _LOSS * self._seconds[False]:
            self._trial, self._pause = _TRIAL, _PAUSE
            del self._seconds[True]  # the next trial is judged by itself


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

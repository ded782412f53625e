"""Prefill and decode speed of several runtimes and bundles, measured in turns on the same machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from rk_export.errors import InputError
from rk_export.progress import track
from rk_export.report.table import Column, Table, make_table
from rk_export.runtime.contestants import (
    BundleContestant,
    Contestant,
    GenAIContestant,
    GuessingContestant,
)
from rk_export.runtime.providers import Provider

_GENAI, _LOOKUP, _DRAFT = "genai:", "lookup:", "draft:"
_SEED = 0


@dataclass(frozen=True)
class BenchRow:
    """One contestant's speed.

    Args:
        name: The bundle, with a prefix where another runtime ran it.
        prefill: Prompt tokens per second, one value per round.
        decode: New tokens per second, one value per round.
        prefill_ratio: Median over the rounds of this contestant's speed over the first one's.
        decode_ratio: The same for decoding.
        guesses: Tokens that it guessed ahead.
        right_guesses: Those that the model would have chosen itself.
    """

    name: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    prefill_ratio: float
    decode_ratio: float
    guesses: int = 0
    right_guesses: int = 0

    @property
    def prefill_median(self) -> float:
        """Prompt tokens per second."""
        return median(self.prefill)

    @property
    def decode_median(self) -> float:
        """New tokens per second."""
        return median(self.decode)


@dataclass(frozen=True)
class BenchResult:
    """What a benchmark measured, first contestant first.

    Args:
        rows: One per contestant.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens decoded after it.
        threads: Threads within one operator.
        prompt: What the prompt was: ``random`` tokens, or ``given``.
    """

    rows: tuple[BenchRow, ...]
    prompt_tokens: int
    new_tokens: int
    threads: int
    prompt: str = "random"

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary, medians included."""
        rows = [
            {**asdict(row), "prefill_median": row.prefill_median, "decode_median": row.decode_median}
            for row in self.rows
        ]
        return {**asdict(self), "rows": rows}

    def table(self) -> Table:
        """Return a table, a line a contestant."""
        titles = ["prefill tok/s", "ratio", "decode tok/s", "ratio"]
        guessed = any(row.guesses for row in self.rows)
        titles += ["right guesses"] if guessed else []
        rows = (
            (
                row.name,
                f"{row.prefill_median:.1f}",
                f"{row.prefill_ratio:.2f}",
                f"{row.decode_median:.1f}",
                f"{row.decode_ratio:.2f}",
                *([f"{row.right_guesses} of {row.guesses}"] if guessed else []),
            )
            for row in self.rows
        )
        return make_table((Column("bundle", "name"), *(Column(title, "number") for title in titles)), rows)


def bench(
    paths: Sequence[str | Path],
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    repeats: int = 5,
    threads: int = 2,
    provider: Provider = "cpu",
    prompt: Sequence[int] | None = None,
    baselines: Sequence[Contestant] = (),
) -> BenchResult:
    """Measure contestants in turns, so that what else the machine does meets all of them alike.

    A round is one prefill of each contestant, then one decode of each; the order turns from round to round.
    One round more is run first and not counted. The prompt is the same for all: random tokens, or the beginning of a
    text, which guesses need.

    Rounds of one process do not average out differences between instances: a bundle opened twice decoded at
    1.06 of its own speed over 24 rounds. Repeat in fresh processes before trusting a few percent,
    and give a bundle twice to see the difference that means nothing.

    Args:
        paths: Bundle folders; ``genai:FOLDER`` runs a folder in ONNX Runtime GenAI, ``lookup:FOLDER`` with guesses from
            what the text said before, ``draft:SMALL:FOLDER`` with those of a smaller bundle.
        prompt_tokens: Length of the prompt.
        new_tokens: Tokens to decode after it.
        repeats: Rounds that count.
        threads: Threads within one operator.
        provider: Execution provider of all ``paths``.
        prompt: At least as many tokens as ``prompt_tokens``, whose beginning is run; None takes random ones.
        baselines: Further contestants, made by the caller.

    Raises:
        InputError: There is no contestant, a number is out of range, the tokens do not fit into a contestant's
            context, or a bundle cannot be opened.
    """
    if min(prompt_tokens, new_tokens, repeats) < 1:
        raise InputError("a number is below 1", where="bench", fix="give counts of at least 1")
    contestants = [*(_open(path, provider, threads) for path in paths), *baselines]
    if not contestants:
        raise InputError("nothing to measure", where="bench", fix="give at least one bundle folder")
    _check_length(contestants, prompt_tokens, new_tokens)
    vocabulary = min(contestant.vocab_size for contestant in contestants)
    tokens = _prompt(prompt, prompt_tokens, vocabulary)
    turns = track(range(repeats + 1), "rounds of the benchmark, a first one to warm up")
    rounds = [_round(contestants, turn, tokens, new_tokens) for turn in turns][1:]
    rows = tuple(_row(index, contestant, rounds) for index, contestant in enumerate(contestants))
    kind = "random" if prompt is None else "given"
    return BenchResult(rows, prompt_tokens, new_tokens, threads, kind)


def _prompt(given: Sequence[int] | None, count: int, vocabulary: int) -> np.ndarray:
    if given is None:
        return np.random.default_rng(_SEED).integers(vocabulary, size=count)
    if len(given) < count:
        raise InputError(
            f"it has {len(given)} tokens, {count} are wanted", where="prompt", fix="give fewer prompt tokens"
        )
    return np.array(given[:count], np.int64)


def _check_length(contestants: Sequence[Contestant], prompt_tokens: int, new_tokens: int) -> None:
    shortest = min(contestants, key=lambda contestant: contestant.max_length)
    needed = prompt_tokens + new_tokens + 1  # the prefill chooses a token too
    if needed > shortest.max_length:
        room = shortest.max_length - new_tokens - 1
        fix = f"give at most {room} prompt tokens" if room > 0 else "give fewer prompt and new tokens"
        raise InputError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones do not fit into a context of "
            f"{shortest.max_length}",
            where=shortest.name,
            fix=fix,
        )


def _open(path: str | Path, provider: Provider, threads: int) -> Contestant:
    if str(path).startswith(_GENAI):
        return GenAIContestant(str(path)[len(_GENAI) :], provider=provider, threads=threads)
    if str(path).startswith(_LOOKUP):
        return GuessingContestant(str(path)[len(_LOOKUP) :], provider=provider, threads=threads)
    if str(path).startswith(_DRAFT):
        draft, _, bundle = str(path)[len(_DRAFT) :].partition(":")
        return GuessingContestant(bundle, draft=draft, provider=provider, threads=threads)
    return BundleContestant(path, provider=provider, threads=threads)


def _round(
    contestants: list[Contestant], turn: int, prompt: np.ndarray, new_tokens: int
) -> list[tuple[float, float]]:
    """Return (prefill, decode) tokens per second of each contestant."""
    first = turn % len(contestants)
    order = [*range(first, len(contestants)), *range(first)]
    if turn // len(contestants) % 2:
        order.reverse()
    prefill, decode = {}, {}
    for index in order:
        contestants[index].reset(len(prompt) + new_tokens + 1)
        prefill[index] = len(prompt) / _seconds(contestants[index].prefill, prompt)
    for index in order:
        decode[index] = new_tokens / _seconds(contestants[index].decode, new_tokens)
    return [(prefill[index], decode[index]) for index in range(len(contestants))]


def _seconds(call: Callable[[Any], None], argument: Any) -> float:
    start = time.perf_counter()
    call(argument)
    return time.perf_counter() - start


def _row(index: int, contestant: Contestant, rounds: list[list[tuple[float, float]]]) -> BenchRow:
    prefill, decode = zip(*(speeds[index] for speeds in rounds), strict=True)
    return BenchRow(
        name=contestant.name,
        prefill=prefill,
        decode=decode,
        prefill_ratio=median(speeds[index][0] / speeds[0][0] for speeds in rounds),
        decode_ratio=median(speeds[index][1] / speeds[0][1] for speeds in rounds),
        guesses=getattr(contestant, "guesses", 0),
        right_guesses=getattr(contestant, "right_guesses", 0),
    )

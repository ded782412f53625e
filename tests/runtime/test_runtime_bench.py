"""The benchmark's turns and numbers, with made-up contestants and with a tiny bundle."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from runtime_models import TinyDecoder

from rk_export.errors import InputError
from rk_export.runtime import BundleContestant, bench


@dataclass
class Clock:
    """Stands in for the ``time`` module: moves only when a contestant works."""

    now: float = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(importlib.import_module("rk_export.runtime.benchmark"), "time", clock)
    return clock


class Worker:
    """Takes a fixed time for each token and writes down its calls."""

    vocab_size = 100
    max_length = 1000

    def __init__(self, name: str, seconds: float, clock: Clock, log: list[str]) -> None:
        self.name, self._seconds, self._clock, self._log = name, seconds, clock, log

    def reset(self, capacity: int) -> None:
        self._log.append(f"{self.name} reset {capacity}")

    def prefill(self, input_ids: np.ndarray) -> None:
        self._log.append(f"{self.name} prefill")
        self._clock.now += self._seconds * len(input_ids)

    def decode(self, count: int) -> None:
        self._log.append(f"{self.name} decode")
        self._clock.now += self._seconds * count


def test_contestants_take_turns(clock: Clock) -> None:
    log: list[str] = []
    workers = [Worker("slow", 0.004, clock, log), Worker("fast", 0.001, clock, log)]
    result = bench([], baselines=workers, prompt_tokens=8, new_tokens=4, repeats=3)
    slow, fast = result.rows
    assert (slow.prefill_ratio, slow.decode_ratio) == (1, 1)
    assert fast.prefill_ratio == pytest.approx(4)
    assert fast.decode_ratio == pytest.approx(4)
    assert slow.prefill_median == pytest.approx(250)
    assert fast.decode_median == pytest.approx(1000)
    assert len(slow.prefill) == len(fast.decode) == 3
    assert "slow reset 13" in log
    firsts = [log[index].split()[0] for index in range(0, len(log), 6)]
    assert firsts == ["slow", "fast", "fast", "slow"]
    turns = [entry for entry in log if "reset" not in entry][:4]
    assert turns == ["slow prefill", "fast prefill", "slow decode", "fast decode"]


def test_result_is_json_and_a_table(clock: Clock) -> None:
    workers = [Worker("one", 1e-4, clock, []), Worker("two", 1e-4, clock, [])]
    result = bench([], baselines=workers, prompt_tokens=2, new_tokens=2, repeats=2)
    loaded = json.loads(json.dumps(result.to_json()))
    assert loaded["rows"][1]["name"] == "two"
    assert loaded["rows"][0]["decode_median"] == result.rows[0].decode_median
    lines = result.table().text().splitlines()
    assert len(lines) == 3
    assert "1.00" in lines[1]


def test_bundles_run(tmp_path: Path) -> None:
    folder = TinyDecoder().write(tmp_path)
    result = bench([folder, str(folder)], prompt_tokens=6, new_tokens=4, repeats=1, threads=1)
    assert all(row.prefill_median > 0 and row.decode_median > 0 for row in result.rows)


def test_guesses_are_counted(tmp_path: Path) -> None:
    folder, small = TinyDecoder().write(tmp_path / "one"), TinyDecoder().write(tmp_path / "small")
    ways = [folder, f"lookup:{folder}", f"draft:{small}:{folder}"]
    prompt = list(b"one two three one two three one two three")
    result = bench(ways, prompt_tokens=40, new_tokens=40, repeats=2, threads=1, prompt=prompt)
    plain, lookup, draft = result.rows
    assert (plain.guesses, plain.right_guesses) == (0, 0)
    assert 0 < lookup.right_guesses <= lookup.guesses
    assert 0 < draft.right_guesses <= draft.guesses
    assert [row.name.partition(" with ")[2] for row in result.rows] == ["", "lookup", f"draft {small}"]
    assert f"{draft.right_guesses} of {draft.guesses}" in result.table().text()
    with pytest.raises(InputError, match="41 tokens, 42 are wanted"):
        bench([folder], prompt_tokens=42, new_tokens=4, prompt=prompt)


def test_decoding_runs_the_graph_once_a_token(tmp_path: Path) -> None:
    contestant = BundleContestant(TinyDecoder().write(tmp_path), threads=1)
    contestant.reset(7)
    contestant.prefill(np.arange(4))
    contestant.decode(3)
    with pytest.raises(InputError, match="do not fit"):
        contestant.decode(1)


def test_nothing_to_measure() -> None:
    with pytest.raises(InputError, match="nothing to measure"):
        bench([])
    with pytest.raises(InputError, match="below 1"):
        bench([], repeats=0)


def test_public_names_are_objects_not_modules() -> None:
    """A submodule named like a public object would replace it once something else is imported from there."""
    runtime = importlib.import_module("rk_export.runtime")
    for _ in range(2):
        for name in sorted(runtime.__all__):
            value = getattr(importlib.import_module("rk_export.runtime"), name)
            assert value.__name__ == name
            assert not isinstance(value, ModuleType)
    files = {path.stem for path in Path(str(runtime.__file__)).parent.glob("*.py")}
    assert not files & set(runtime.__all__)

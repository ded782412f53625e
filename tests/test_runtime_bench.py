"""The benchmark's turns and numbers, with made-up contestants and with a tiny bundle."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from runtime_models import TinyDecoder

from rk_export.errors import InputError
from rk_export.runtime import BundleContestant, bench


class Sleeper:
    """Takes a fixed time for each token and writes down its calls."""

    vocab_size = 100

    def __init__(self, name: str, seconds: float, log: list[str]) -> None:
        self.name, self._seconds, self._log = name, seconds, log

    def reset(self, capacity: int) -> None:
        self._log.append(f"{self.name} reset {capacity}")

    def prefill(self, input_ids: np.ndarray) -> None:
        self._log.append(f"{self.name} prefill")
        time.sleep(self._seconds * len(input_ids))

    def decode(self, count: int) -> None:
        self._log.append(f"{self.name} decode")
        time.sleep(self._seconds * count)


def test_contestants_take_turns() -> None:
    log: list[str] = []
    sleepers = [Sleeper("slow", 0.004, log), Sleeper("fast", 0.001, log)]
    result = bench([], baselines=sleepers, prompt_tokens=8, new_tokens=4, repeats=3)
    slow, fast = result.rows
    assert (slow.prefill_ratio, slow.decode_ratio) == (1, 1)
    assert 2 < fast.prefill_ratio < 5
    assert 2 < fast.decode_ratio < 5
    assert 120 < slow.prefill_median < 250
    assert len(slow.prefill) == len(fast.decode) == 3
    assert "slow reset 13" in log
    firsts = [log[index].split()[0] for index in range(0, len(log), 6)]
    assert firsts == ["slow", "fast", "fast", "slow"]
    turns = [entry for entry in log if "reset" not in entry][:4]
    assert turns == ["slow prefill", "fast prefill", "slow decode", "fast decode"]


def test_result_is_json_and_a_table() -> None:
    sleepers = [Sleeper("one", 1e-4, []), Sleeper("two", 1e-4, [])]
    result = bench([], baselines=sleepers, prompt_tokens=2, new_tokens=2, repeats=2)
    loaded = json.loads(json.dumps(result.to_json()))
    assert loaded["rows"][1]["name"] == "two"
    assert loaded["rows"][0]["decode_median"] == result.rows[0].decode_median
    lines = result.table().splitlines()
    assert len(lines) == 3
    assert "1.00" in lines[1]


def test_bundles_run(tmp_path: Path) -> None:
    folder = TinyDecoder().write(tmp_path)
    result = bench([folder, str(folder)], prompt_tokens=6, new_tokens=4, repeats=1, threads=1)
    assert all(row.prefill_median > 0 and row.decode_median > 0 for row in result.rows)


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

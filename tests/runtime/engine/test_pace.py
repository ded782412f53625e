"""The length of a prompt's chunk: fixed, or by the timings of steps and chunks."""

from __future__ import annotations

import pytest

from rk_export.runtime.engine import pace
from rk_export.runtime.engine.pace import Pace
from rk_export.runtime.engine.rounding import GRAIN


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until it is set."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


def timed(clock: list[float], one: Pace, step: float, token: float) -> None:
    with one.timed_step():
        clock[0] += step
    with one.timed_chunk(10):
        clock[0] += 10 * token


@pytest.mark.parametrize(("chunk", "tokens"), [(64, 64), (70, 64), (8, 8), (1, GRAIN)])
def test_a_fixed_chunk_is_made_of_whole_grains(chunk: int, tokens: int) -> None:
    assert Pace(chunk).tokens(waiting=True) == tokens
    assert Pace(chunk).tokens(waiting=False) == tokens


def test_a_chunk_takes_as_long_as_a_few_steps(clock: list[float]) -> None:
    one = Pace(None)
    untimed = one.tokens(waiting=True)
    assert untimed % GRAIN == 0
    timed(clock, one, step=0.020, token=0.001)
    assert one.tokens(waiting=True) == 56, "60 tokens take three steps"
    for _ in range(40):
        timed(clock, one, step=0.040, token=0.001)
    assert one.tokens(waiting=True) == 112, "it follows what changes"
    for _ in range(40):
        timed(clock, one, step=0.0001, token=0.001)
    assert one.tokens(waiting=True) == GRAIN
    for _ in range(40):
        timed(clock, one, step=10.0, token=0.001)
    assert one.tokens(waiting=True) == one.tokens(waiting=False), "more would not be quicker"


def test_where_nobody_waits_chunks_are_long(clock: list[float]) -> None:
    one = Pace(None)
    timed(clock, one, step=0.020, token=0.001)
    assert one.tokens(waiting=False) > one.tokens(waiting=True)

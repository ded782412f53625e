"""Stages: what the library says of them, with and without something that shows them."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys

import pytest

from rk_export import progress
from rk_export.progress import Bar, shown_by, stage, track


class Recorded:
    """A bar that keeps what it was told."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.told: list[object] = [(title, total, done)]

    def advance(self, count: int = 1, note: str = "") -> None:
        self.told.append((count, note) if note else count)

    def close(self) -> None:
        self.told.append("closed")


@pytest.fixture
def bars() -> list[Recorded]:
    return []


def _opening(bars: list[Recorded]) -> progress.OpenBar:
    def open_bar(title: str, total: int, done: int) -> Bar:
        bars.append(Recorded(title, total, done))
        return bars[-1]

    return open_bar


def test_items_are_yielded_and_counted(bars: list[Recorded]) -> None:
    with shown_by(_opening(bars)):
        assert list(track("ab", "letters")) == ["a", "b"]
        assert list(track(iter("abc"), "letters", 3)) == ["a", "b", "c"]
    assert [bar.told for bar in bars] == [
        [("letters", 2, 0), 1, 1, "closed"],
        [("letters", 3, 0), 1, 1, 1, "closed"],
    ]


def test_an_item_counts_once_its_work_is_done(bars: list[Recorded]) -> None:
    with shown_by(_opening(bars)):
        for _ in track([1], "one"):
            assert bars[0].told == [("one", 1, 0)]


def test_a_stage_that_goes_on_begins_where_it_stopped(bars: list[Recorded]) -> None:
    with shown_by(_opening(bars)), stage("steps", 10, done=4) as bar:
        bar.advance(2, note="loss 1")
    assert bars[0].told == [("steps", 10, 4), (2, "loss 1"), "closed"]


def test_bars_close_on_errors_and_early_ends(bars: list[Recorded]) -> None:
    with shown_by(_opening(bars)):
        with pytest.raises(KeyError), stage("fails", 2):
            raise KeyError
        for _ in track([1, 2], "ends early"):
            break
    assert [bar.told[-1] for bar in bars] == ["closed", "closed"]


def test_the_former_way_of_showing_comes_back(bars: list[Recorded]) -> None:
    with pytest.raises(KeyError), shown_by(_opening(bars)):
        raise KeyError
    with stage("later", 1):
        pass
    assert not bars


def test_what_cannot_be_counted_is_a_fault() -> None:
    with pytest.raises(TypeError, match="say how many"):
        list(track(iter("ab"), "letters"))


def _lines(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, total: int, pace: float
) -> list[str]:
    """Return the log lines of a stage whose items take `pace` seconds each."""
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, progress.__name__):
        for _ in track(range(total), "items"):
            now += pace
    return caplog.messages


def test_a_short_stage_is_one_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _lines(caplog, monkeypatch, 1000, 0.005) == ["items: 1000"]


def test_a_long_stage_says_how_long_the_rest_takes(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = _lines(caplog, monkeypatch, 1000, 1.0)
    assert lines[:3] == [
        "items: 1000",
        "items: 5 of 1000, about 17 min left",
        "items: 10 of 1000, about 16 min left",
    ]
    assert lines[-1] == "items: 952 of 1000, about 50 s left"
    assert len(lines) == 42


def test_lines_are_five_seconds_to_a_minute_apart(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = _lines(caplog, monkeypatch, 36_000, 1.0)
    places = [int(line.split()[1]) for line in lines[1:]]
    pauses = {after - before for before, after in itertools.pairwise(places)}
    assert (min(pauses), max(pauses)) == (5, 60)
    assert lines[-300].endswith("about 5.0 h left")


def test_a_stage_that_goes_on_is_estimated_by_this_run_alone(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, progress.__name__), stage("steps", 100, done=90) as bar:
        now = 6.0
        bar.advance()
    assert caplog.messages == [
        "steps: 100, 90 of them done before",
        "steps: 91 of 100, about 55 s left",
    ]


def test_the_note_is_in_the_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO, progress.__name__), stage("steps", 4, done=2) as bar:
        now = 11.0
        bar.advance(note="loss 2.5")
    assert caplog.messages[1:] == ["steps: 3 of 4, loss 2.5, about 10 s left"]


def test_it_is_a_leaf_of_the_standard_library() -> None:
    code = "import sys, rk_export.progress; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"rich", "tqdm", "numpy", "torch"}

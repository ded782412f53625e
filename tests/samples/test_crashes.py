"""The stories of interrupted compressions: where they are cut, what is judged, and what the page says of it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from measure import crashes
from measure.harness import Results, Row

LINES = [
    (1.0, "load: opening it"),
    (2.0, "check: comparing"),
    (2.5, "reading layers: 2"),
    (6.0, "reading layers: 2"),
    (7.0, "export: tracing"),
    (9.0, "parity, tiers: 6"),
]


def test_kill_points_take_turns_in_the_stages() -> None:
    points = [crashes.kill_point(LINES, number, seed=0) for number in range(60)]
    assert points == [crashes.kill_point(LINES, number, seed=0) for number in range(60)]
    assert points != [crashes.kill_point(LINES, number, seed=1) for number in range(60)]
    kinds = [{(line, count) for line, count, _ in points[stage::3]} for stage in range(3)]
    assert kinds[0] == {("load: opening it", 1)}
    assert kinds[1] == {("check: comparing", 1), ("reading layers: 2", 1), ("reading layers: 2", 2)}
    assert kinds[2] == {("export: tracing", 1)}
    longest = {("load: opening it", 1): 1.0, ("reading layers: 2", 1): 3.5}
    assert all(0 <= delay <= longest.get((line, count), 2.0) for line, count, delay in points)


WORK = """
import os, sys, time
for line in ("load: it", "step: 1", "step: 1"):
    print(line, file=sys.stderr, flush=True)
print(os.environ["RK_EXPORT_CACHE"], file=sys.stderr, flush=True)
time.sleep(60)
"""


def test_a_process_is_killed_after_a_line(tmp_path: Path) -> None:
    process = crashes.Process([sys.executable, "-c", WORK], tmp_path)
    begin = time.monotonic()
    assert process.said("step: ", 2)
    assert process.said(str(tmp_path))
    assert process.runs
    assert process.kill() == crashes.SIGKILL
    assert time.monotonic() - begin < 50
    assert not process.said("step: ", 3)


def test_one_bit_is_flipped_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes([1, 2, 3, 4]))
    crashes.flip(path)
    assert path.read_bytes() == bytes([1, 2, 2, 4])
    crashes.flip(path)
    assert path.read_bytes() == bytes([1, 2, 3, 4])


def test_what_tells_times_is_not_compared(tmp_path: Path) -> None:
    for name in ("model.onnx", *crashes.DATED):
        (tmp_path / name).write_text(name)
    assert list(crashes.checksums(tmp_path)) == ["model.onnx"]
    assert crashes.checksums(tmp_path / "absent") == {}


def killed(stage: str, *, identical: bool = True, found: str = "") -> Row:
    ends = {"status": -9, "again_status": 0, "went_on_from": found, "identical": identical, "left": []}
    return {"stage": stage, "line": f"{stage}: it", "delay": 0.5, **ends, "passed": identical}


@pytest.mark.parametrize("identical", [True, False])
def test_the_page_reads_its_rows(identical: bool) -> None:
    results = Results(Path("absent"), "crashes", {"model": "a model", "set": []})
    results.rows = {
        crashes.WHOLE: {"files": {}, "lines": [], "passed": True},
        "kill-01": killed("load"),
        "kill-02": killed("rewrite", identical=identical, found="the plan, 1 layers"),
        "full-export": {**killed("export"), "status": 2, "message": "out: no space left on the disk"},
    }
    page = crashes.page(results)
    assert f"same bundle in {1 + identical} of 2 cases" in page
    assert "2 runs were killed, in 2 stages: load, rewrite." in page
    assert "1 of these runs found work" in page
    assert "full in 1 stages. The run ended with status 2 in 1 of them" in page
    assert ("Not as it should be: kill-02." in page) is not identical
    assert "| full-export | 2 | out: no space left on the disk |" in page

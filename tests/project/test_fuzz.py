"""2,000 damaged files, 200 of each kind, opened as users open them; `tests/measure_fuzz.py` runs more."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz_cases.kinds import KINDS
from measure_fuzz import RESULTS, page

SCRIPT = Path(__file__).parents[1] / "measure_fuzz.py"
CASES = 200


def test_the_page_is_what_was_measured() -> None:
    data = json.loads((RESULTS / "fuzz.json").read_text(encoding="utf-8"))
    assert (RESULTS / "fuzz.md").read_text(encoding="utf-8") == page(data)
    assert [row["kind"] for row in data["rows"]] == [*KINDS]
    assert [row["kind"] for row in data["rows"] if row["failed"]] == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the limits are those of Linux")
def test_damaged_files_are_refused_or_read() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--together", "--cases", str(CASES)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["kind"] for row in rows] == [*KINDS]
    for row in rows:
        assert row["taken"] + row["refused"] == row["cases"] == CASES
        assert row["refused"] > CASES // 10, "the damage does not reach what is read"

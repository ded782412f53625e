"""Real processes that `kill -9` ends, one after the other: the last one makes the bundle of a run without them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from measure.crashes import SIGKILL, Process, checksums

from rk_export.work_folder import work_folder_of

pytestmark = [pytest.mark.whole, pytest.mark.slow]

# Each run comes further than the one before it.
LINES = ("sampling tokens", "gradients, layers", "predicting losses", "rewriting layers", "export: ")


def test_five_kills_in_a_row_change_nothing(llama: Path, tmp_path: Path) -> None:
    def start(out: Path) -> Process:
        words = [sys.executable, "-m", "rk_export.cli.main", "compress", str(llama), "-o", str(out)]
        options = ["--set", "calibration.tokens=512", "--device", "cpu", "--threads", "1"]
        return Process([*words, *options], out.parent / "cache")

    whole, out = tmp_path / "one" / "out", tmp_path / "other" / "out"
    assert start(whole).wait() == 0
    for line in LINES:
        process = start(out)
        assert process.said(line), process.log
        assert process.kill() == SIGKILL
        assert not out.exists()
        assert work_folder_of(out).is_dir()
    last = start(out)
    assert last.wait() == 0, last.log
    assert "going on with an unfinished run: the plan, " in last.log
    assert checksums(out) == checksums(whole)
    assert sorted(os.listdir(out.parent)) == ["cache", "out"]

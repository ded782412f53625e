"""What a killed process left is found and removed; what a living one writes stays."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rk_export.atomic import beside, this_place
from rk_export.folders import AtomicFolder, check_replaceable
from rk_export.half_written import leftovers, remove_leftovers

KILLED = """
import os, signal, sys
from pathlib import Path
from rk_export.atomic import atomic_file
from rk_export.folders import AtomicFolder
with AtomicFolder(Path(sys.argv[1]) / "out") as folder, atomic_file(Path(sys.argv[1]) / "file") as file:
    (folder / "half").write_text("half")
    file.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def left_by(process: int, target: Path, kind: str = "partial", place: str = "") -> Path:
    """Return the hidden folder of a process, with a file in it."""
    path = target.with_name(f".{target.name}.{kind}-{place or this_place()}-{process}-0123abcd")
    path.mkdir()
    (path / "half").write_text("half")
    return path


@pytest.fixture(scope="module")
def gone() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.slow
def test_what_a_killed_process_left_goes_with_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    caplog.set_level(logging.INFO)
    found = [path for path, _ in leftovers(tmp_path)]
    assert [path.name.split("-")[0] for path in found] == [".file.partial", ".out.partial"]
    with AtomicFolder(tmp_path / "out") as partial:
        assert sorted(tmp_path.iterdir()) == sorted([found[0], partial])  # the file is another output's
        (partial / "whole").write_text("whole")
    assert str(found[1]) in caplog.text
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_lives_stays(tmp_path: Path) -> None:
    own = beside(tmp_path / "out", "partial")
    own.write_text("half")
    left_by(os.getppid(), tmp_path / "out")
    (tmp_path / ".out.partial-mine").touch()
    before = sorted(tmp_path.iterdir())
    assert remove_leftovers(tmp_path) == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_process_of_another_machine_counts_as_gone_after_a_day(tmp_path: Path, gone: int) -> None:
    path = left_by(gone, tmp_path / "out", place="ffffffff")
    assert remove_leftovers(tmp_path) == []
    for one in (path / "half", path):
        os.utime(one, (time.time() - 90_000,) * 2)
    (path / "newer").write_text("it writes still")
    os.utime(path, (time.time() - 90_000,) * 2)
    assert remove_leftovers(tmp_path) == []
    (path / "newer").unlink()
    os.utime(path, (time.time() - 90_000,) * 2)
    assert remove_leftovers(tmp_path) == [path]


def test_an_old_output_comes_back_where_the_new_one_never_came(
    tmp_path: Path, gone: int, caplog: pytest.LogCaptureFixture
) -> None:
    left_by(gone, tmp_path / "out", "old")
    left_by(gone, tmp_path / "out")
    (tmp_path / "other").mkdir()
    left_by(gone, tmp_path / "other", "old")
    check_replaceable(tmp_path / "new" / "out", force=False)
    assert len(list(tmp_path.iterdir())) == 4
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]
    assert (tmp_path / "out" / "half").read_text() == "half"
    assert not any((tmp_path / "other").iterdir())
    assert "the old one is back" in caplog.text


def test_a_folder_that_is_not_there_has_no_leftovers(tmp_path: Path) -> None:
    assert remove_leftovers(tmp_path / "none") == []

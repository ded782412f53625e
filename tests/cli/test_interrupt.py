"""Real processes that are ended from outside: what is left, what is said, and what the next run makes of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Cli

from rk_export import tensor_cache
from rk_export.work_folder import state_file

pytestmark = [pytest.mark.whole, pytest.mark.slow]

# Holds a command in the middle of a stage, so that the signal meets it there.
PROGRAM = """
import signal, sys, time
from rk_export import progress
from rk_export.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background ignores it
advance = progress.LogBar.advance

def held(bar, count=1, note=""):
    advance(bar, count, note)
    if bar._title.startswith(sys.argv[1]):
        print("held", file=sys.stderr, flush=True)
        time.sleep(120)

progress.LogBar.advance = held
sys.exit(main(sys.argv[2:]))
"""
OPTIONS = ("--recipe", "int4", "--set", "calibration.tokens=512", "--device", "cpu", "--threads", 1)
HEALED = (*OPTIONS, "--set", "heal.steps=2")
STATISTICS = ("self-text", "dense-statistics", "table-curvature")


@dataclass(frozen=True)
class Stopped:
    """How a process ended that was held in a stage and then got a signal."""

    code: int
    err: str
    out: str

    @property
    def last(self) -> str:
        return self.err.splitlines()[-1]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, for this process and those that it starts."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RK_EXPORT_CACHE", str(folder))
    monkeypatch.setattr(tensor_cache, "CACHE", folder)
    return folder


def stopped(stage: str, *arguments: object, by: signal.Signals = signal.SIGINT) -> Stopped:
    command = [sys.executable, "-c", PROGRAM, stage, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    assert process.stdout is not None
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line == "held\n":
            process.send_signal(by)
    out = process.stdout.read()
    return Stopped(process.wait(timeout=60), "".join(lines), out)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("stage", "by", "options", "kept"),
    [
        ("sampling tokens", signal.SIGINT, OPTIONS, ()),
        ("gradients", signal.SIGTERM, OPTIONS, STATISTICS[:1]),
        ("rewriting layers", signal.SIGINT, OPTIONS, STATISTICS),
        ("steps of", signal.SIGINT, HEALED, STATISTICS),
        ("parity", signal.SIGTERM, OPTIONS, STATISTICS),
    ],
)
def test_an_interrupted_compression_goes_on(
    cli: Cli,
    llama: Path,
    tmp_path: Path,
    cache: Path,
    stage: str,
    by: signal.Signals,
    options: tuple[object, ...],
    kept: tuple[str, ...],
) -> None:
    out = tmp_path / "outputs" / "out"
    out.mkdir(parents=True)
    (out / "report.json").write_text("{}")  # an output of ours, to be replaced
    command = ("compress", llama, "-o", out, "--force", *options)
    ended = stopped(stage, *command, by=by)
    assert (ended.code, ended.out) == (128 + by, "")
    assert "Traceback" not in ended.err
    assert contents(out) == {"report.json": b"{}"}
    heals = options is HEALED
    assert {path.name for path in out.parent.iterdir() if path != out} <= {".out.work"}
    assert state_file(out, "heal").is_file() is heals
    assert all(kind.replace("-", " ") in ended.last for kind in kept)
    assert ("the state of heal" in ended.last) is heals
    assert ("nothing is kept" in ended.last) is not kept
    assert f"run {' '.join(map(str, ('rk-export', *command)))}" in ended.last
    again = cli(*command)
    assert again.code == 0, again.err
    assert all(f"read from {cache / kind}" in again.err for kind in kept)
    assert ("goes on after step 1 of 2" in again.err) is heals
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_interrupted_measurement_starts_again(
    llama: Path, prose: Path, tmp_path: Path, cache: Path
) -> None:
    ended = stopped("windows of text", "eval", llama, "--text", prose, "--context", 64, "--json")
    assert (ended.code, ended.out) == (130, "")
    error = json.loads(ended.last)["error"]
    assert (error["kind"], error["kept"]) == ("Interrupted", [])
    assert error["fix"].startswith("run the same again: rk-export eval ")
    assert not cache.exists()

"""What a command shows while it works, on a pseudo terminal and without one."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Cli
from sample_report import full_report

from rk_export.cli.terminal import _progress, show
from rk_export.report.render import summary, text_table
from rk_export.report.table import Column, Table

HIDDEN, SHOWN = "\x1b[?25l", "\x1b[?25h"
PROGRAM = """
import argparse, logging, signal, sys, time
from rk_export.cli.main import run_command
from rk_export.errors import InputError
from rk_export.progress import track

signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs the tests in the background ignores it

def work(args):
    for step in track(range(4), "testing steps"):
        for part in track(range(2), "testing parts"):
            time.sleep(0.05)
        if step == 1:
            logging.getLogger("rk_export").warning("a line above")
            {then}
    print("result")
    return 0

sys.exit(run_command(work, argparse.Namespace(json={json}, quiet={quiet}), ["test"]))
"""
DUMB = {"TERM": "dumb"}


@dataclass(frozen=True)
class Shown:
    code: int
    screen: str
    out: str = ""


def _program(then: str = "pass", json: bool = False, quiet: bool = False) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(then=then, json=json, quiet=quiet)]


def _on_a_terminal(command: list[str], *, interrupt_at: str = "", **more: str) -> Shown:
    """Run a command with errors and progress on a pseudo terminal and results in a pipe."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **more}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, env=environment, start_new_session=True
    )
    os.close(theirs)
    screen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 1)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            screen += piece
        if interrupt_at and interrupt_at.encode() in screen:
            process.send_signal(signal.SIGINT)
            interrupt_at = ""
    os.close(ours)
    assert process.stdout is not None
    out = process.stdout.read().decode()
    return Shown(process.wait(timeout=30), screen.decode(), out)


def _restored(screen: str) -> bool:
    """Whether the cursor that bars hide is shown in the end."""
    return screen.count(HIDDEN) > 0 and screen.rindex(SHOWN) > screen.rindex(HIDDEN)


def test_a_terminal_shows_one_bar_a_stage_and_lines_above_it() -> None:
    shown = _on_a_terminal(_program())
    assert shown.code == 0
    assert shown.out == "result\n"
    assert "testing steps" in shown.screen
    assert "0:00" in shown.screen  # the time that is left
    assert "a line above\r\n" in shown.screen
    assert "testing steps: 4" not in shown.screen
    assert _restored(shown.screen)
    assert shown.screen.rpartition("\x1b[2K")[2].strip("\r\x1b[?25h1A") == ""


@pytest.mark.parametrize(
    ("then", "code", "last"),
    [
        ("raise InputError('broken', where='here', fix='mend it')", 2, "rk-export: error:"),
        ("raise ValueError('a fault')", 1, "ValueError: a fault"),
    ],
)
def test_the_terminal_is_restored_before_an_error_is_told(then: str, code: int, last: str) -> None:
    shown = _on_a_terminal(_program(then))
    assert shown.code == code
    assert _restored(shown.screen)
    assert shown.screen.rindex(SHOWN) < shown.screen.index(last)


def test_the_terminal_is_restored_when_interrupted() -> None:
    shown = _on_a_terminal(_program("time.sleep(30)"), interrupt_at="a line above")
    assert shown.code == 130
    assert _restored(shown.screen)
    assert shown.screen.rindex(SHOWN) < shown.screen.index("rk-export: interrupted")


@pytest.mark.parametrize("how", ["json", "dumb"])
def test_a_terminal_without_bars_gets_lines(how: str) -> None:
    shown = _on_a_terminal(_program(json=how == "json"), **(DUMB if how == "dumb" else {}))
    assert "\x1b" not in shown.screen
    assert "testing steps: 4\r\n" in shown.screen


def test_a_bar_that_goes_on_is_estimated_by_this_run_alone() -> None:
    now = 0.0
    progress = _progress()
    progress.get_time = lambda: now
    task = progress.add_task("steps", total=100, completed=90, note="")
    for _ in range(3):
        now += 2.0
        progress.update(task, advance=1)
    assert progress.tasks[0].time_remaining == 14  # 7 steps of 2 seconds


def test_quiet_shows_results_alone() -> None:
    shown = _on_a_terminal(_program(quiet=True))
    assert (shown.screen, shown.out) == ("", "result\n")


def test_without_a_terminal_a_stage_is_a_line() -> None:
    done = subprocess.run(_program(), capture_output=True, text=True, check=True)
    parts = ["testing parts: 2"] * 2
    assert done.stderr.splitlines() == ["testing steps: 4", *parts, "a line above", *parts]
    assert done.stdout == "result\n"


@pytest.mark.whole
def test_compress_says_a_line_a_stage(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ended = cli("compress", llama, "-o", tmp_path / "out", "--recipe", "floats", "--device", "cpu")
    assert ended.code == 0
    assert "\x1b" not in ended.err
    lines = ended.err.splitlines()
    assert [line for line in lines if line.startswith("rewrit") and "left" not in line] == [
        "rewrite: factorizing and quantizing layer by layer",
        "rewriting layers: 2",
    ]
    assert sum(line.startswith("writing tensors: ") for line in lines) == 1


def test_results_are_plain_text_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show(*summary(full_report()))
    assert capsys.readouterr().out == text_table(full_report()) + "\n"


WIDE = Table(
    (Column("name", "name"), Column("result", "status"), Column("why")),
    (("layers.0.qk", "FAIL", "a reason of many words that does not fit into the width of a terminal"),),
    "Checks",
)


SHOW = f"""
from rk_export.cli.terminal import _progress, show
from rk_export.report.table import Column, Table
show("a [b]line[/b]", {WIDE!r})
"""


def _printed(columns: int) -> str:
    """Return what results look like on a terminal of some width."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)}
    subprocess.run([sys.executable, "-c", SHOW], stdin=theirs, stdout=theirs, env=environment, check=True)
    os.close(theirs)
    printed = os.read(ours, 65536).decode()
    os.close(ours)
    return printed


def test_prose_is_folded_to_the_width_of_a_terminal() -> None:
    printed = _printed(60)
    assert printed.startswith("a [b]line[/b]\r\n\r\n")
    assert "\x1b[1;31mFAIL" in printed
    assert len(printed.splitlines()) > 5
    assert all(word in printed for word in WIDE.rows[0][2].split())


def test_nothing_is_cut_off_where_a_table_does_not_fit() -> None:
    assert _printed(20).splitlines()[-1] == "layers.0.qk  FAIL    " + WIDE.rows[0][2]

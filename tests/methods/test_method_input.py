"""Texts, budgets and schedules that the published systems cannot use: refused with exit code 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Cli

TASK = " ".join(f"{number} plus 1 is {number + 1}." for number in range(300))


@pytest.fixture
def task(tmp_path: Path) -> Path:
    path = tmp_path / "task.txt"
    path.write_text(TASK, encoding="utf-8")
    return path


def refusal(cli: Cli, *arguments: object, out: Path) -> str:
    ended = cli("compress", *arguments, "-o", out)
    assert ended.code == 2
    assert "Traceback" not in ended.err
    assert not out.exists()
    assert list(out.parent.glob(f".{out.name}*")) == []
    message: str = ended.err.split("rk-export: error: ", 1)[1]
    return message


def test_a_missing_task_file(cli: Cli, llama: Path, tmp_path: Path) -> None:
    arguments = (llama, "--recipe", "basel", "--keep", 0.9, "--set", f"basel.target={tmp_path / 'none.txt'}")
    assert "none.txt" in refusal(cli, *arguments, out=tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "empty"), (b"too short", "one sequence takes"), (b"\xff\xfe\x00\x80" * 100, "UTF-8")],
)
def test_a_task_file_that_is_no_use(
    cli: Cli,
    llama: Path,
    tmp_path: Path,
    content: bytes,
    message: str,
) -> None:
    path = tmp_path / "task.txt"
    path.write_bytes(content)
    arguments = (llama, "--recipe", "basel", "--keep", 0.9, "--set", f"basel.target={path}")
    assert message in refusal(cli, *arguments, out=tmp_path / "out")


def test_a_schedule_that_keeps_nothing(cli: Cli, llama: Path, task: Path, tmp_path: Path) -> None:
    arguments = (llama, "--recipe", "basel", "--keep", 0.05, "--set", f"basel.target={task}")
    assert "basel.keep" in refusal(cli, *arguments, out=tmp_path / "out")


@pytest.mark.parametrize("budget", [("--keep", 1e-6), ("--size", "1kB")])
def test_a_budget_that_the_pools_cannot_meet(
    cli: Cli,
    llama: Path,
    tmp_path: Path,
    budget: tuple[str, object],
) -> None:
    arguments = (llama, "--recipe", "cap", *budget, "--set", "calibration.tokens=512", "--set", "cap.steps=1")
    assert budget[0] in refusal(cli, *arguments, out=tmp_path / "out")


@pytest.mark.whole
def test_a_basel_bundle_cannot_be_made_again(cli: Cli, llama: Path, task: Path, tmp_path: Path) -> None:
    settings = [f"basel.target={task}", "basel.keep=0.9", "basel.steps=2", "basel.new_basis=4"]
    flags = [argument for setting in settings for argument in ("--set", setting)]
    made = cli("compress", llama, "-o", tmp_path / "out", "--recipe", "basel", *flags)
    assert made.code == 0, made.err
    assert cli("verify", tmp_path / "out").code == 0
    again = cli("verify", tmp_path / "out", "--against", llama)
    assert again.code == 2
    assert "trained for a task" in again.err

"""What every command does with --json and --quiet: a command that the parser has and no line is here for fails."""

from __future__ import annotations

import argparse
import json
import logging
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from signing_keys import write_keys

from rk_export.cli.main import run_command
from rk_export.cli.parser import build_parser
from rk_export.progress import track

pytestmark = pytest.mark.whole

# A line of every command on the tiny model; `{name}` stands for a path of `places`.
LINES: dict[str, tuple[object, ...]] = {
    "compress": ("{llama}", "-o", "{out}", "--recipe", "floats", "--dry-run"),
    "analyze": ("{llama}", "-o", "{out}", "--recipe", "joint-rank"),
    "plan": ("{llama}", "-o", "{out}", "--recipe", "joint-rank"),
    "recipes": (),
    "prepare": ("{llama}", "-o", "{out}", "--passes", "fold"),
    "export": ("{llama}", "-o", "{out}", "--threads", 1),
    "verify": ("{bundle}", "--threads", 1),
    "sign": ("{own}", "--key", "{key}"),
    "eval": ("{llama}", "--text", "{prose}", "--context", 64, "--tokens", 128),
    "run": ("{bundle}", "-p", "The harbour", "--max-new-tokens", 4),
    "serve": ("{bundle}", "--port", 0),
    "bench": ("{bundle}", "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "--provider", "cpu"),
    "compare": ("{bundle}", "{own}"),
    "report": ("{bundle}",),
    "bundle": ("{own}", "--for", "triton"),
    "explain": ("{bundle}",),
    "cache": (),
    "doctor": (),
}


def commands() -> dict[str, argparse.ArgumentParser]:
    (choice,) = (item for item in build_parser()._actions if isinstance(item, argparse._SubParsersAction))
    return dict(choice.choices)


@pytest.fixture(autouse=True)
def served_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """`serve` announces itself and ends."""

    def run(app: Any, listener: socket.socket, announce: Callable[[], None]) -> None:
        announce()
        listener.close()

    monkeypatch.setattr("rk_export.runtime.server.serve.run", run)


@pytest.fixture
def places(llama: Path, bundle: Path, own_bundle: Path, prose: Path, tmp_path: Path) -> dict[str, Path]:
    return {
        "llama": llama,
        "bundle": bundle,
        "own": own_bundle,
        "prose": prose,
        "key": write_keys(tmp_path)[0],
        "out": tmp_path / "out",
        "none": tmp_path / "no",
    }


def line(command: str, places: dict[str, Path]) -> list[str]:
    return [command, *(str(word).format_map(places) for word in LINES[command])]


def document(text: str) -> Any:
    """Return the one JSON document that a text is; NaN and infinities are none."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


def test_every_command_has_a_line() -> None:
    assert set(LINES) == set(commands())


@pytest.mark.parametrize("command", commands())
def test_every_command_prints_one_document_and_nothing_else(
    cli: Cli, places: dict[str, Path], command: str
) -> None:
    ended = cli(*line(command, places), "--json", "--quiet")
    assert ended.code == 0, ended.err
    assert isinstance(document(ended.out), dict | list)
    assert ended.err == ""


@pytest.mark.parametrize("command", commands())
def test_errors_of_every_command_are_json_too(cli: Cli, places: dict[str, Path], command: str) -> None:
    ended = cli(*line(command, places), "--json", "--no-such-option")
    assert (ended.code, ended.out) == (2, "")
    error = document(ended.err)["error"]
    assert (error["kind"], error["exit_code"]) == ("UsageError", 2)
    assert "--no-such-option" in error["what"]


@pytest.mark.parametrize("command", [command for command in commands() if LINES.get(command)])
def test_what_is_missing_is_an_error_in_json(cli: Cli, places: dict[str, Path], command: str) -> None:
    words = line(
        command, {**places, "llama": places["none"], "bundle": places["none"], "own": places["none"] / "own"}
    )
    ended = cli(*words, "--json", "--quiet")
    assert (ended.code, ended.out) == (2, "")
    error = document(ended.err)["error"]
    assert error["kind"] == "InputError"
    assert str(places["none"]) in error["where"]
    assert error["fix"]


@pytest.mark.usefixtures("cli")  # it puts the log back as it was
@pytest.mark.parametrize("command", commands())
@pytest.mark.parametrize("quiet", [False, True])
def test_quiet_takes_log_lines_and_warnings_away(
    places: dict[str, Path], capsys: pytest.CaptureFixture[str], command: str, quiet: bool
) -> None:
    def work(args: argparse.Namespace) -> int:
        for _ in track(range(2), "steps"):
            logging.getLogger("rk_export").warning("a warning")
        warnings.warn("of a library", stacklevel=1)
        print("result")
        return 0

    args = build_parser().parse_args([*line(command, places), *(["--quiet"] if quiet else [])])
    assert run_command(work, args, [command]) == 0
    shown = capsys.readouterr()
    assert shown.out == "result\n"
    if quiet:
        assert shown.err == ""
    else:
        assert shown.err.splitlines()[:3] == ["steps: 2", "a warning", "a warning"]


def test_an_error_is_words_without_json(cli: Cli, places: dict[str, Path]) -> None:
    ended = cli("explain", places["none"])
    assert ended.code == 2
    assert ended.err.startswith("rk-export: error: ")
    assert "\nFix: " in ended.err
    usage = cli("explain")
    assert usage.code == 2
    assert usage.err.startswith("usage: rk-export explain")
    assert "rk-export explain: error: the following arguments are required: bundle" in usage.err


def test_run_prints_what_it_generated(cli: Cli, places: dict[str, Path]) -> None:
    words = line("run", places)
    found = document(cli(*words, "--json").out)
    assert list(found) == ["text", "token_ids", "finish_reason", "prompt_tokens", "new_tokens", "seconds"]
    assert found["new_tokens"] == len(found["token_ids"]) == 4
    assert found["finish_reason"] == "length"
    assert found["seconds"] > 0
    assert cli(*words).out == found["text"] + "\n"


def test_a_chat_is_no_document(cli: Cli, bundle: Path) -> None:
    ended = cli("run", bundle, "--json")
    assert (ended.code, ended.out) == (2, "")
    assert document(ended.err)["error"]["where"] == "--json"

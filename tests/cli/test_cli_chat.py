"""`run` without a prompt: a conversation on a real terminal and through a pipe; and the arguments of `run`."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from runtime_models import EOS, TinyDecoder, write_encoder

from rk_export.cli.chat import Conversation
from rk_export.errors import InputError
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.bundle_files import read_json

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
LONG_CONTEXT = 20_000


def write_bundle(folder: Path, template: str | None = None, context: int | None = None) -> Path:
    """Write a tiny bundle, which writes random bytes; a larger context only lets it write for longer."""
    TinyDecoder(grouped=False).write(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if context is not None:
        config = {**read_json(folder / "config.json"), "max_position_embeddings": context}
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process, self.shown, self._master = process, "", master

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt(self) -> None:
        """Press Ctrl-C, once the process waits: Python misses one that comes while it begins to."""
        time.sleep(1)
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, text: str, *, seconds: float = 120) -> str:
        """Return what came up to a text."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.shown!r}"
            self.shown += os.read(self._master, 4096).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def exit_code(self, *, seconds: float = 60) -> int:
        """Read what is left and return the exit code."""
        end = time.monotonic() + seconds
        while True:
            ready, _, _ = select.select([self._master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"it did not end: {self.shown!r}"
            try:
                read = os.read(self._master, 4096)
            except OSError:  # Linux: the terminal is closed
                break
            if not read:
                break
            self.shown += read.decode(errors="replace")
        return self.process.wait(timeout=60)


def _heeds_interrupts() -> None:
    # A shell starts background jobs with SIGINT ignored, and children inherit that; those on a terminal do not.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def terminal(*arguments: object) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "rk_export.cli.main", "run", *map(str, arguments), "--provider", "cpu"]
    environment = {**os.environ, "TERM": "dumb", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env=environment,
        start_new_session=True,
        preexec_fn=_heeds_interrupts,
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        process.kill()
        process.wait()
        os.close(master)


def test_a_conversation_on_a_terminal(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", context=LONG_CONTEXT)
    with terminal(bundle, "--max-new-tokens", LONG_CONTEXT - 1000, "--stop-token-id", EOS) as shell:
        shell.wait_for("Ctrl-C stops an answer")
        shell.wait_for("> ")
        shell.type("hello\n")
        shell.wait_for("hello")
        shell.interrupt()
        shell.wait_for("[stopped]")
        shell.wait_for("> ")
        shell.type("/reset\n")
        shell.wait_for("[forgotten]")
        shell.wait_for("> ")
        shell.type("/exit\n")
        assert shell.exit_code() == 0
        assert "Traceback" not in shell.shown


@pytest.mark.parametrize("leave", ["interrupt", "end of input"])
def test_leaving_at_the_prompt(tmp_path: Path, leave: str) -> None:
    with terminal(write_bundle(tmp_path / "bundle"), "--max-new-tokens", 2) as shell:
        shell.wait_for("> ")
        shell.type("\n")  # says nothing, so nothing is answered
        shell.wait_for("> ")
        if leave == "interrupt":
            shell.interrupt()
        else:
            shell.type("\x04")
        assert shell.exit_code() == 0
        assert "Traceback" not in shell.shown


def test_an_interrupt_clears_a_line_before_it_leaves(tmp_path: Path) -> None:
    pytest.importorskip("readline")
    with terminal(write_bundle(tmp_path / "bundle"), "--max-new-tokens", 2) as shell:
        shell.wait_for("> ")
        shell.type("half a line")
        shell.wait_for("half a line")
        shell.interrupt()
        shell.wait_for("> ")
        shell.interrupt()
        assert shell.exit_code() == 0


def test_a_message_that_cannot_be_answered_does_not_end_the_chat(tmp_path: Path) -> None:
    with terminal(write_bundle(tmp_path / "bundle"), "--max-new-tokens", 2) as shell:
        shell.wait_for("> ")
        shell.type("x" * 200 + "\n")
        shell.wait_for("leave no room in a context of 96")
        shell.wait_for("> ")
        shell.type("/exit\n")
        assert shell.exit_code() == 0


# --- through a pipe


def piped(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))


def test_lines_of_a_pipe_are_answered_with_what_went_before(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    piped(monkeypatch, b"ab\n\n  cd  \n")
    ended = cli("run", bundle, "--provider", "cpu", "--max-new-tokens", 3, "--system", "s")
    assert ended.code == 0, ended.err
    session = Session.from_pretrained(bundle, provider="cpu")
    options = GenerationOptions(max_new_tokens=3)
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}]
    answers = []
    for text in ("ab", "cd"):
        messages.append({"role": "user", "content": text})
        answers.append(session.chat(messages, options).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert ended.out == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"x" * 200, "leave no room in a context of 96"), (b"a\xff\n", "standard input: not UTF-8")],
)
def test_a_line_that_cannot_be_answered_ends_a_pipe(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
) -> None:
    piped(monkeypatch, data)
    ended = cli("run", write_bundle(tmp_path / "bundle"), "--provider", "cpu")
    assert ended.code == 2
    assert message in ended.err


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        ("", (), "no chat template"),
        ("{{ raise_exception('no system') }}", (), "no system"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('who?') }}{% endif %}", ("--system", "s"), "who?"),
        ("{{ messages[0].content + 1 }}", (), "the template refuses the messages"),
    ],
)  # fmt: skip
def test_a_chat_that_cannot_begin_is_refused(
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    bundle = write_bundle(tmp_path / "bundle", template)
    if not template:
        (bundle / "chat_template.jinja").unlink()
    piped(monkeypatch, b"hello\n")
    ended = cli("run", bundle, "--provider", "cpu", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


# --- the conversation


def test_the_oldest_turns_are_forgotten_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = Session.from_pretrained(write_bundle(tmp_path / "bundle"), provider="cpu")
    system = [{"role": "system", "content": "s"}]
    talk = Conversation(session, GenerationOptions(max_new_tokens=8), system, {})
    for index in range(6):
        "".join(talk.ask(f"question {index}"))
    assert talk.messages[0] == system[0]
    assert {"role": "user", "content": "question 5"} in talk.messages
    assert {"role": "user", "content": "question 0"} not in talk.messages
    assert (
        "the context of 96 tokens is full: the oldest 1 of the turns are forgotten" in capsys.readouterr().err
    )
    talk.reset()
    assert talk.messages == system


def test_a_stopped_answer_is_remembered_as_far_as_it_came(tmp_path: Path) -> None:
    session = Session.from_pretrained(write_bundle(tmp_path / "bundle"), provider="cpu")
    talk = Conversation(session, GenerationOptions(max_new_tokens=30), [], {})
    answer = talk.ask("hello")
    part = next(answer)
    answer.close()
    assert [message["content"] for message in talk.messages] == ["hello", part]
    with pytest.raises(InputError, match="leave no room"):
        next(talk.ask("x" * 200))
    assert len(talk.messages) in (0, 2), "a message that was not answered is not kept"


# --- arguments of run


def test_version(cli: Cli) -> None:
    ended = cli("--version")
    assert (ended.code, ended.out) == (0, f"rk-export {metadata.version('rk-export')}\n")


def test_template_arguments_reach_the_template(cli: Cli, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle", "{{ messages[0].content }}{{ mode }}{{ tools }}")
    run = ("run", bundle, "-p", "a", "--provider", "cpu", "--max-new-tokens", 5)
    given = ("--template-arg", 'mode="x"', "--template-arg", "tools=[{}]")
    expected = Session.from_pretrained(bundle, provider="cpu").generate(
        [[*b"ax[{}]"]], options=GenerationOptions(max_new_tokens=5)
    )
    assert cli(*run, "--chat", *given).out == f"{expected[0].text}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--chat", "--template-arg", "mode"), "is no KEY=JSON"),
        (("--chat", "--template-arg", "=1"), "is no KEY=JSON"),
        (("--chat", "--template-arg", "a b=1"), "is no KEY=JSON"),
        (("--chat", "--template-arg", "mode=text"), "--template-arg mode: 'text' is no JSON"),
        (("--chat", "--template-arg", "mode="), "--template-arg mode: '' is no JSON"),
        (("--chat", "--template-arg", "messages=[]"), "messages is set by the command"),
        (("--chat", "--template-arg", "a=1", "--template-arg", "a=2"), "a is given twice"),
        (("--chat", "--template-arg", "tools=5"), "tools: 5 is no list of dictionaries"),
        (("--template-arg", "a=1"), "--template-arg: goes with a chat"),
        (("--system", "s"), "--system: goes with a chat"),
        (("--stop-token-id", -1), "stop_token_ids"),
        (("--stop-token-id", 258), "stop_token_ids: 258 is not in a vocabulary of 258"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_impossible_arguments(cli: Cli, tmp_path: Path, arguments: tuple[object, ...], message: str) -> None:
    ended = cli("run", write_bundle(tmp_path / "bundle"), "--provider", "cpu", "-p", "hi", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_a_stop_token(cli: Cli, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bundle")
    free = Session.from_pretrained(bundle, provider="cpu").generate("hi")[0]
    stop = free.token_ids[5]
    expected = Session.from_pretrained(bundle, provider="cpu").generate(
        "hi", options=GenerationOptions(stop_token_ids=(stop,))
    )
    shown = cli("run", bundle, "--provider", "cpu", "-p", "hi", "--stop-token-id", stop).out
    assert shown == f"{expected[0].text}\n"
    assert free.text.startswith(expected[0].text)
    assert len(expected[0].token_ids) <= 6


def test_an_encoder_does_not_chat(cli: Cli, tmp_path: Path) -> None:
    ended = cli("run", write_encoder(tmp_path / "out"), "--provider", "cpu")
    assert (ended.code, ended.out) == (2, "")
    assert "an encoder does not chat" in ended.err

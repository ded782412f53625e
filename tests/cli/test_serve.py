"""The command `serve`: what it prints, what it refuses, and that each of its options reaches the server."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, Ended
from serving import write_decoder

from rk_export.cli.parser import build_parser
from rk_export.cli.serve import KEYS_VARIABLE, settings_of
from rk_export.runtime.engine import EngineOptions
from rk_export.runtime.providers import SessionSettings
from rk_export.runtime.server import serve as server_module
from rk_export.runtime.server.settings import ServerSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would be served: the applications, announced and not run."""
    apps: list[Any] = []

    def run(app: Any, listener: socket.socket, announce: Any) -> None:
        apps.append(app)
        announce()
        listener.close()

    monkeypatch.setattr(server_module, "run", run)
    return apps


def serve(cli: Cli, folder: Path, *words: object) -> Ended:
    return cli("serve", folder, "--port", 0, *words)


def test_one_line_says_where_and_what(cli: Cli, folder: Path, started: list[Any]) -> None:
    ended = serve(cli, folder)
    assert re.fullmatch(r"(http://127\.0\.0\.1:\d+) serves tiny; routes: \1/openapi\.json\n", ended.out), (
        ended.out
    )
    document = json.loads(serve(cli, folder, "--json").out)
    assert document["models"] == ["tiny"]
    assert document["openapi"] == document["url"] + "/openapi.json"
    assert "[::1]" in serve(cli, folder, "--host", "::1").out


PLAIN = ServerSettings()
# Words, the field of the settings, its value. What a field does is tested in `tests/runtime/server`.
OPTIONS: list[tuple[tuple[object, ...], str, Any]] = [
    (("--host", "127.0.0.2"), "host", "127.0.0.2"),
    (("--slots", 3), "engine", EngineOptions(slots=3)),
    (("--queue", 5), "engine", EngineOptions(queue=5)),
    (("--chunk", 16), "engine", EngineOptions(chunk=16)),
    (("--context", 128), "engine", EngineOptions(capacity=128)),
    (("--kept-prefixes", 0), "engine", EngineOptions(kept_prefixes=0)),
    (("--lookup",), "engine", EngineOptions(lookup=True)),
    (("--draft", "out/small"), "draft", Path("out/small")),
    (("--max-tokens", 7), "max_tokens", 7),
    (("--max-body", "2MB"), "max_body", 2_000_000),
    (("--timeout", 1.5), "timeout", 1.5),
    (("--grace", 0), "grace", 0.0),
    (("--cors", "https://a.example", "--cors", "*"), "cors", ("https://a.example", "*")),
    (("--memory-limit", "1.5GB"), "memory_limit", 1_500_000_000),
    (("--provider", "cpu"), "session", SessionSettings("cpu")),
    (("--threads", 2), "session", SessionSettings(threads=2)),
    (("--no-spinning",), "session", SessionSettings(spinning=False)),
]


@pytest.mark.parametrize(("words", "field", "value"), OPTIONS, ids=lambda part: str(part))
def test_options_reach_the_server(
    cli: Cli, folder: Path, started: list[Any], words: tuple[object, ...], field: str, value: Any
) -> None:
    assert serve(cli, folder, *words).code == 0
    found = started[0].state.context.settings
    assert getattr(found, field) == value != getattr(PLAIN, field)


def test_every_option_is_tested() -> None:
    parser = next(
        action.choices["serve"]
        for action in build_parser()._actions
        if action.dest != "help" and isinstance(action.choices, dict)
    )
    known = {max(action.option_strings, key=len) for action in parser._actions if action.option_strings}
    tested = {str(words[0]) for words, _, _ in OPTIONS} | {"--port", "--name", "--api-key-file"}
    assert known - {"--help", "--json", "--quiet"} == tested


def test_the_port_is_the_one_that_is_given(cli: Cli, folder: Path, started: list[Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = cli("serve", folder, "--port", port)
        assert ended.code == 2
        assert f"127.0.0.1:{port}: cannot listen" in ended.err
    assert f":{port} serves" in cli("serve", folder, "--port", port).out


def test_names_and_keys(
    cli: Cli, folder: Path, started: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "serves chat;" in serve(cli, folder, "--name", "chat").out
    keys = tmp_path / "keys.txt"
    keys.write_text("first-key-1\n")
    monkeypatch.setenv(KEYS_VARIABLE, "second-key-2")
    assert serve(cli, folder, "--api-key-file", keys).code == 0
    assert started[-1].state.context.settings.keys == ("second-key-2", "first-key-1")


@pytest.mark.parametrize("keys", ["", ","])
def test_an_empty_list_of_keys_opens_no_server(
    cli: Cli, folder: Path, started: list[Any], monkeypatch: pytest.MonkeyPatch, keys: str
) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, keys)
    ended = serve(cli, folder)
    assert ended.code == 2
    assert f"{KEYS_VARIABLE}: no key in it" in ended.err
    monkeypatch.delenv(KEYS_VARIABLE)  # as where a pod's optional secret is absent
    assert serve(cli, folder).code == 0
    assert started[0].state.context.settings.keys == ()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--slots", 0), "slots"),
        (("--port", 70000), "port"),
        (("--timeout", 0), "timeout"),
        (("--api-key-file", "absent.txt"), "absent.txt"),
        (("--name", "a=b"), "names no bundle"),
        (("--memory-limit", 5), "the limit is 5"),
        (("--memory-limit", "much"), "no size"),
        (("--max-body", "big"), "no size"),
        (("--provider", "tpu"), "tpu"),
        (("--context", 1), "capacity"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_anything_is_opened(
    cli: Cli, folder: Path, started: list[Any], words: tuple[object, ...], why: str
) -> None:
    ended = cli("serve", folder, *words)
    assert (ended.code, ended.out) == (2, "")
    assert why in ended.err
    assert not started


def test_an_extra_that_is_missing_is_named(cli: Cli, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "uvicorn" else before(name, *rest)
    )
    ended = serve(cli, folder)
    assert ended.code == 2
    assert "pip install 'rk-export[serve]'" in ended.err
    assert "uvicorn" in ended.err


def test_defaults_are_those_of_the_settings() -> None:
    found = settings_of(build_parser().parse_args(["serve", "out/a"]))
    assert found == PLAIN

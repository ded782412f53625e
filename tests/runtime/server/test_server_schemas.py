"""Schemas that cost too much: long ones, ones that cannot be followed, one for many answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher
from serving import Running, error_of, serving, streamed, write_decoder

from rk_export.runtime.server.json_schema import GrammarTokens

BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 40}
HARD = {"type": "integer", "multipleOf": 999983, "minimum": -1e15, "maximum": 1e15}
ROUTE = "/v1/chat/completions"


def keeping(schema: dict[str, Any], **more: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    return {**BODY, "response_format": form, **more}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny", ends=True)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving({"tiny": folder}) as running:
        yield running


def test_a_schema_that_cannot_be_followed_is_the_clients(
    server: Running, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        whole = server.post(ROUTE, keeping(HARD))
        stream = streamed(server.post(ROUTE, keeping(HARD, stream=True)).iter_lines())
    assert whole.status_code == 400
    assert not stream.done
    for error in (error_of(whole), stream.error):
        assert error is not None
        assert error["code"] == "invalid_schema"
        assert error["param"] == "response_format.json_schema.schema"
        assert "999983" not in error["message"]
    assert "999983" not in caplog.text
    assert "lexer" not in capfd.readouterr().err
    assert server.post(ROUTE, BODY).status_code == 200


def test_a_schema_has_a_length(server: Running) -> None:
    for number, status in ((4000, 200), (8000, 400)):
        answer = server.post(ROUTE, keeping({"enum": [f"{n:08d}" for n in range(number)]}))
        assert answer.status_code == status, answer.text
    assert error_of(answer)["code"] == "invalid_schema"
    assert "65536" in error_of(answer)["message"]


def test_many_answers_share_one_grammar(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compiled = LLMatcher.grammar_from_json_schema

    def counted(*given: Any, **more: Any) -> Any:
        made.append(1)
        return compiled(*given, **more)

    monkeypatch.setattr(LLMatcher, "grammar_from_json_schema", counted)
    answer = server.post(ROUTE, keeping({"enum": ["ab", "cd", "ef"]}, n=12, temperature=2, seed=1))
    texts = [choice["message"]["content"] for choice in answer.json()["choices"]]
    assert set(texts) <= {'"ab"', '"cd"', '"ef"'}
    assert len(set(texts)) > 1
    assert made == [1]


def test_work_before_the_engine_counts_and_ends_with_the_client(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()

    def slow(*_: Any) -> None:
        release.wait(20)

    with serving({"tiny": folder}, timeout=0.5) as server:
        monkeypatch.setattr(GrammarTokens, "constraint", slow)
        begin = time.monotonic()
        answer = server.post(ROUTE, keeping({"type": "integer"}))
        assert (answer.status_code, error_of(answer)["code"]) == (504, "timeout")
        assert time.monotonic() - begin < 10
        release.set()
    release.clear()
    with serving({"tiny": folder}) as server:
        with pytest.raises(httpx.ReadTimeout):
            server.post(ROUTE, keeping({"type": "integer"}), timeout=0.3)
        server.until(lambda: server.context.models.served["tiny"].uses == 0, 5)
        assert not release.is_set()
        release.set()

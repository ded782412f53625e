"""What the server says when something in it has failed: an engine, or a bundle at the start."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from serving import Running, error_of, serving, streamed, write_decoder

from rk_export.errors import RkExportError
from rk_export.runtime.engine import EngineOptions
from rk_export.runtime.engine.engine import _MOST_FAULTS
from rk_export.runtime.engine.slots import SlotRunner
from rk_export.runtime.server import models as models_module
from rk_export.runtime.server.app import create_app
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.serve import listen, run
from rk_export.runtime.server.settings import ServerSettings

BODY = {"model": "tiny", "prompt": "The harbour", "max_tokens": 4, "temperature": 0}
PROBES = ("/health/ready", "/v2/health/ready", "/v2/models/tiny/ready", "/health/live", "/v2/health/live")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny")


def break_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise SystemError("the device is gone")

    monkeypatch.setattr(SlotRunner, "extend", broken)


@pytest.fixture
def dead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server whose engine was ended by faults; another model of it is well."""
    with serving({"tiny": folder, "well": folder}) as server:
        break_engine(monkeypatch)
        for _ in range(_MOST_FAULTS):
            server.post("/v1/completions", BODY)
        server.until(lambda: not server.decoder().engine.alive)
        monkeypatch.undo()
        yield server


def test_an_engine_that_ended_by_a_fault_is_no_shutdown(dead: Running) -> None:
    assert [dead.get(path).status_code for path in PROBES] == [503] * len(PROBES)
    assert dead.get("/v2/models/well/ready").status_code == 200
    whole = dead.post("/v1/completions", BODY)
    streaming = dead.post("/v1/completions", {**BODY, "stream": True})
    tokens = {"name": "input_ids", "shape": [1, 2], "datatype": "INT64", "data": [1, 2]}
    for answer in (whole, streaming):
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
    assert dead.post("/v2/models/tiny/infer", {"inputs": [tokens]}).status_code == 500
    assert dead.post("/v1/completions", {**BODY, "model": "well"}).status_code == 200


def test_one_fault_is_an_error_and_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"tiny": folder}) as server:
        with monkeypatch.context() as patch:
            break_engine(patch)
            answer = server.post("/v1/completions", BODY)
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
        assert [server.get(path).status_code for path in PROBES] == [200] * len(PROBES)
        assert server.post("/v1/completions", BODY).status_code == 200


def test_answers_that_the_fault_cut_are_no_shutdown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving({"tiny": folder}) as server, ThreadPoolExecutor(2) as clients:
        with server.held():
            whole = clients.submit(server.post, "/v1/completions", BODY)
            part = clients.submit(server.post, "/v1/completions", {**BODY, "stream": True})
            server.until(lambda: server.decoder().engine.counters().requests == 2)
            break_engine(monkeypatch)
        answer, events = whole.result(), streamed(part.result().iter_lines())
        assert (answer.status_code, error_of(answer)["code"]) == (500, "internal_error")
        assert events.error is not None
        assert events.error["code"] == "internal_error"


def test_a_server_that_ends_has_no_fault(dead: Running) -> None:
    dead.context.state.draining = True
    try:
        assert dead.get("/health/live").status_code == 200
        assert dead.get("/health/ready").status_code == 503
    finally:
        dead.context.state.draining = False


def test_any_error_of_the_opening_ends_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(models_module, "open_bundle", broken)
    settings = ServerSettings(port=0)
    with ThreadPoolExecutor(1) as threads:
        app, listener = create_app(Models({"tiny": folder}, settings), settings), listen("127.0.0.1", 0)
        announced: list[bool] = []
        ran = threads.submit(run, app, listener, lambda: announced.append(True))
        with pytest.raises(RkExportError, match="RuntimeError: out of memory"):
            ran.result(20)
        assert not announced


def test_a_client_that_does_not_read_its_stream_is_let_go(folder: Path) -> None:
    with serving({"tiny": folder}, timeout=1.0, engine=EngineOptions(slots=8, queue=16)) as server:
        body = {**BODY, "max_tokens": 900, "n": 16, "logprobs": 20, "stream": True}
        data = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        length = f"Content-Length: {len(data)}\r\n\r\n"
        host, port = server.url.removeprefix("http://").split(":")
        for listener in server.server.servers:  # connections inherit it: the answer must not fit into buffers
            listener.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect((host, int(port)))
            slow.sendall((head + length).encode() + data)
            server.until(lambda: server.context.state.running == 1)
            server.until(lambda: server.context.state.running == 0, seconds=15)
            assert server.context.models.served["tiny"].uses == 0
            server.until(lambda: server.decoder().engine.counters().running == 0)
        assert server.post("/v1/completions", BODY).status_code == 200

"""From the start to the end: full queues, clients that leave, time-outs, drains, signals, several models."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from runtime_models import write_encoder
from serving import Running, checked, error_of, serving, streamed, write_decoder

from rk_export.errors import InputError
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import EngineOptions
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.names import named_folders
from rk_export.runtime.server.serve import listen
from rk_export.runtime.server.settings import ServerSettings

ONE = EngineOptions(slots=1, queue=1)
BODY = {"model": "tiny", "prompt": "The harbour", "max_tokens": 20, "temperature": 0}
LONG = {**BODY, "max_tokens": 900}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def expected(folder: Path) -> str:
    session = Session.from_pretrained(folder, provider="cpu", threads=1)
    return session.generate("The harbour", options=GenerationOptions(max_new_tokens=20))[0].text


@contextlib.contextmanager
def connection(server: Running, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request and leave the answer to the block; the end of the block closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    length = f"Content-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as found:
        found.sendall((head + length).encode() + data)
        yield found


def test_a_full_queue_says_when_to_come_again(folder: Path, expected: str) -> None:
    with serving({"tiny": folder}, engine=ONE) as server, ThreadPoolExecutor(8) as clients:
        with server.held():
            asked = [clients.submit(server.post, "/v1/completions", BODY) for _ in range(8)]
            server.until(lambda: sum(one.done() for one in asked) >= 6)
            refused = [one.result() for one in asked if one.done()]
            streamed_too = server.post("/v1/completions", {**BODY, "stream": True})
        for answer in (*refused, streamed_too):
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            assert (error_of(answer)["code"], error_of(answer)["type"]) == ("queue_full", "rate_limit_error")
        taken = [one.result() for one in asked if one.result().status_code == 200]
        assert len(taken) == 2
        assert {answer.json()["choices"][0]["text"] for answer in taken} == {expected}
        counters = server.decoder().engine.counters()
        assert counters.refused == 7


def test_a_request_that_does_not_fit_whole_is_not_begun(folder: Path) -> None:
    with serving({"tiny": folder}, engine=EngineOptions(slots=2, queue=2)) as server:
        with ThreadPoolExecutor(1) as clients, server.held():
            first = clients.submit(server.post, "/v1/completions", {**BODY, "n": 3})
            server.until(lambda: server.decoder().engine.counters().requests == 3)
            assert server.post("/v1/completions", {**BODY, "n": 3}).status_code == 429
        assert first.result().status_code == 200
        server.until(lambda: _idle(server))
        assert server.post("/v1/completions", {**BODY, "n": 4}).status_code == 200
        assert error_of(server.post("/v1/completions", {**BODY, "n": 5}))["param"] == "n"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(folder: Path, stream: bool) -> None:
    with serving({"tiny": folder}, engine=ONE) as server:
        with server.held():
            with connection(server, {**LONG, "stream": stream}):
                server.until(lambda: server.decoder().engine.counters().requests == 1)
            # The engine is held, so nothing but the closed connection can end the request.
            server.until(lambda: server.context.state.running == 0)
        server.until(lambda: _idle(server))
        counters = server.decoder().engine.counters()
        assert counters.finished.get("cancelled") == 1
        assert counters.new_tokens < 50


def test_a_waiting_client_that_leaves_is_forgotten(folder: Path, expected: str) -> None:
    with serving({"tiny": folder}, engine=ONE) as server, ThreadPoolExecutor(1) as clients:
        with server.held():
            first = clients.submit(server.post, "/v1/completions", BODY)
            server.until(lambda: server.decoder().engine.counters().requests == 1)
            with connection(server, {**LONG, "stream": True}):
                server.until(lambda: server.decoder().engine.counters().requests == 2)
            server.until(lambda: server.context.state.running == 1)
        assert first.result().json()["choices"][0]["text"] == expected
        server.until(lambda: _idle(server))
        assert server.decoder().engine.counters().new_tokens < 20 + 50


def test_an_answer_that_takes_too_long_is_ended(folder: Path) -> None:
    with serving({"tiny": folder}, engine=ONE, timeout=0.5) as server:
        with server.held():
            whole = server.post("/v1/completions", LONG)
            assert whole.status_code == 504
            assert error_of(whole)["code"] == "timeout"
            parts = streamed(server.post("/v1/completions", {**LONG, "stream": True}).iter_lines())
            assert parts.error is not None
            assert parts.error["code"] == "timeout"
            assert not parts.done
        server.until(lambda: _idle(server))


def test_a_drain_finishes_what_runs_and_takes_no_more(folder: Path, expected: str) -> None:
    with serving({"tiny": folder}) as server, ThreadPoolExecutor(2) as clients:
        with server.held():
            running = clients.submit(server.post, "/v1/completions", BODY)
            part = clients.submit(server.post, "/v1/completions", {**BODY, "stream": True})
            server.until(lambda: server.decoder().engine.counters().requests == 2)
            server.server.handle_exit(signal.SIGTERM, None)
            refused = server.post("/v1/completions", BODY)
            assert (refused.status_code, error_of(refused)["code"]) == (503, "shutting_down")
            assert "retry-after" in refused.headers
            assert server.get("/health/ready").status_code == 503
            assert server.get("/health/live").status_code == 200
        assert running.result().json()["choices"][0]["text"] == expected
        assert streamed(part.result().iter_lines()).text() == expected


def test_a_drain_ends_when_the_grace_is_over(folder: Path) -> None:
    with serving({"tiny": folder}, engine=ONE, grace=0.2) as server, ThreadPoolExecutor(1) as clients:
        with server.held():
            running = clients.submit(server.post, "/v1/completions", LONG)
            server.until(lambda: server.decoder().engine.counters().requests == 1)
            server.server.handle_exit(signal.SIGTERM, None)
            server.until(lambda: server.context.models.served["tiny"].opened is None)
            time.sleep(0.2)
        answer = running.result()
        assert (answer.status_code, error_of(answer)["code"]) == (503, "shutting_down")


def test_it_is_not_ready_while_models_are_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on, seen = threading.Event(), []
    before = Models.open_at_start

    def slow(models: Models) -> None:
        go_on.wait(20)
        before(models)

    monkeypatch.setattr(Models, "open_at_start", slow)
    listener = listen("127.0.0.1", 0)  # a port that is free now
    port = listener.getsockname()[1]
    listener.close()

    def look() -> None:
        url = f"http://127.0.0.1:{port}"
        while not seen:
            with contextlib.suppress(httpx.TransportError):
                paths = ("/health/live", "/health/ready", "/v2/health/ready", "/v1/models")
                seen.extend(httpx.get(f"{url}{path}").status_code for path in paths)
        go_on.set()

    monkeypatch.setattr("serving.listen", lambda host, _: listen(host, port))
    looking = threading.Thread(target=look)
    looking.start()
    with serving({"tiny": folder}) as server:
        looking.join()
        assert seen == [200, 503, 503, 503]
        assert server.get("/health/ready").status_code == 200


def test_several_models_are_opened_under_a_limit(folder: Path, tmp_path: Path) -> None:
    other, encoder = write_decoder(tmp_path / "other", seed=1), write_encoder(tmp_path / "enc")
    folders = {"tiny": folder, "other": other, "enc": encoder}
    sizes = {name: one.bytes for name, one in Models(folders, ServerSettings()).served.items()}
    limit = sizes["tiny"] + sizes["enc"]
    texts = {}
    for name in ("tiny", "other"):
        session = Session.from_pretrained(folders[name], provider="cpu", threads=1)
        texts[name] = session.generate("The harbour", options=GenerationOptions(max_new_tokens=20))[0].text
    assert texts["tiny"] != texts["other"]
    with serving(folders, memory_limit=limit) as server:

        def loaded() -> list[str]:
            listed = server.get("/v1/models").json()["data"]
            return [entry["id"] for entry in listed if entry["loaded"]]

        assert loaded() == ["tiny"]
        for name in ("tiny", "other", "tiny"):
            answer = server.post("/v1/completions", {**BODY, "model": name}).json()
            assert answer["choices"][0]["text"] == texts[name]
            assert loaded() == [name]
        assert server.post("/v1/embeddings", {"model": "enc", "input": "a"}).status_code == 200
        assert loaded() == ["tiny", "enc"]
        with ThreadPoolExecutor(1) as clients, server.held():
            busy = clients.submit(server.post, "/v1/completions", BODY)
            server.until(lambda: server.context.models.served["tiny"].uses == 1)
            refused = server.post("/v1/completions", {**BODY, "model": "other"})
            assert (refused.status_code, error_of(refused)["code"]) == (503, "no_memory")
        assert busy.result().json()["choices"][0]["text"] == texts["tiny"]


def test_models_asked_for_at_once_are_opened_once(folder: Path, tmp_path: Path) -> None:
    other = write_decoder(tmp_path / "other", seed=1)
    with serving({"tiny": folder, "other": other}, memory_limit=1 << 40) as server:
        assert server.context.models.served["other"].opened is None
        with ThreadPoolExecutor(4) as clients:
            bodies = [{**BODY, "model": name} for name in ("other", "tiny", "other", "other")]
            answers = list(clients.map(lambda body: server.post("/v1/completions", body), bodies))
        assert [answer.status_code for answer in answers] == [200] * 4
        texts = [answer.json()["choices"][0]["text"] for answer in answers]
        assert texts[0] == texts[2] == texts[3] != texts[1]
        assert server.decoder("other").engine.counters().requests == 3


def test_a_model_that_cannot_be_opened_later_is_no_fault_of_the_client(folder: Path, tmp_path: Path) -> None:
    other = write_decoder(tmp_path / "other", seed=1)
    with serving({"tiny": folder, "other": other}, memory_limit=1 << 40) as server:
        (other / "model.onnx").write_bytes(b"nothing")
        answer = server.post("/v1/completions", {**BODY, "model": "other"})
        assert (answer.status_code, error_of(answer)["code"]) == (503, "model_failed")
        assert str(tmp_path) not in answer.text
        assert server.post("/v1/completions", BODY).status_code == 200


def test_settings_reach_the_engine(folder: Path) -> None:
    options = EngineOptions(slots=3, queue=5, chunk=16, capacity=128, kept_prefixes=2)
    with serving({"tiny": folder}, engine=options) as server:
        assert server.decoder().engine.options == options
    with serving({"tiny": folder}) as server:
        assert server.decoder().engine.options.capacity == 1024  # the model's own


@pytest.mark.parametrize("kept", [0, 4])
def test_a_prompt_that_begins_like_another_is_partly_copied(folder: Path, kept: int) -> None:
    texts, cached = [], []
    prompt = "A long and common beginning of many prompts. " * 3
    with serving({"tiny": folder}, engine=EngineOptions(slots=2, queue=2, kept_prefixes=kept)) as server:
        for _ in range(2):
            answer = server.post("/v1/completions", {**BODY, "prompt": prompt}).json()
            texts.append(answer["choices"][0]["text"])
            cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        metrics = server.get("/metrics").text
    assert texts[0] == texts[1]
    assert cached[0] == 0
    assert (cached[1] > 0) == (kept > 0)
    assert f'rk_export_cached_prompt_tokens_total{{model="tiny"}} {float(cached[1])}' in metrics


@pytest.mark.parametrize("by", ["lookup", "draft"])
def test_guesses_change_no_answer_and_are_counted(folder: Path, expected: str, by: str) -> None:
    guessing: dict[str, Any] = {"engine": EngineOptions(slots=2, queue=2, lookup=by == "lookup")}
    if by == "draft":
        guessing["draft"] = folder  # the model itself: every guess is right
    with serving({"tiny": folder}, **guessing) as server:
        answer = server.post("/v1/completions", BODY).json()
        assert checked(answer)["choices"][0]["text"] == expected
        long = server.post("/v1/completions", {**LONG, "max_tokens": 400}).json()
        details = long["usage"]["completion_tokens_details"]
        metrics = server.get("/metrics").text
    assert sum(details.values()) > 0
    if by == "draft":
        assert details["accepted_prediction_tokens"] > 100
    assert 'rk_export_drafted_tokens_total{model="tiny"} 0.0' not in metrics


def test_what_no_server_can_be_made_of(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the limit is"):
        Models({"tiny": folder}, ServerSettings(memory_limit=1000))
    with pytest.raises(InputError, match=r"no model\.onnx"):
        Models({"x": tmp_path}, ServerSettings())
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_names_of_bundles() -> None:
    a, b, c = Path("out/a"), Path("out/b"), Path("other/a")
    assert named_folders([a, b], []) == {"a": a, "b": b}
    assert named_folders([a], ["chat"]) == {"chat": a}
    assert named_folders([a, c], ["chat=other/a"]) == {"a": a, "chat": c}
    with pytest.raises(InputError, match="no name of a model"):
        named_folders([a], ["a/b"])
    for folders, names in (([a, c], []), ([a, b], ["chat"]), ([a], ["x=out/b"]), ([a], ["=out/a"])):
        with pytest.raises(InputError):
            named_folders(folders, names)


def _idle(server: Running) -> bool:
    counters = server.decoder().engine.counters()
    return counters.running == counters.waiting == 0


@contextlib.contextmanager
def process(*words: object, env: dict[str, str] | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Run the command itself and give its process and its address."""
    command = [
        sys.executable,
        "-m",
        "rk_export.cli.main",
        "serve",
        *map(str, words),
        "--port",
        "0",
        "--provider",
        "cpu",
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    ) as ran:
        try:
            assert ran.stdout is not None
            yield ran, ran.stdout.readline().split(" ")[0]
        finally:
            if ran.poll() is None:
                ran.kill()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_process_finish_its_answers(folder: Path, number: signal.Signals) -> None:
    session = Session.from_pretrained(folder, provider="cpu", threads=1)
    text = session.generate("The harbour", options=GenerationOptions(max_new_tokens=900))[0].text
    with process(folder, "--name", "tiny", "--threads", 1) as (ran, url):
        with httpx.stream(
            "POST", f"{url}/v1/completions", json={**LONG, "stream": True}, timeout=60
        ) as answer:
            lines = answer.iter_lines()
            first = next(lines)
            ran.send_signal(number)
            found = streamed([first, *lines])
        assert found.done
        assert found.text() == text
        _, log = ran.communicate(timeout=60)
        assert ran.returncode == 0
    assert all("message" in json.loads(line) for line in log.splitlines())
    assert "Traceback" not in log


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(folder: Path) -> None:
    with process(folder, "--name", "tiny", "--grace", 60, "--threads", 1) as (ran, url):
        with contextlib.suppress(httpx.TransportError), ThreadPoolExecutor(1) as clients:
            body = {**LONG, "n": 60}
            answer = clients.submit(httpx.post, f"{url}/v1/completions", json=body, timeout=60)
            while 'rk_export_requests_running{model="tiny"} 0' in httpx.get(f"{url}/metrics").text:
                time.sleep(0.01)
            ran.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health/ready").status_code == 200:
                time.sleep(0.01)
            ran.send_signal(signal.SIGTERM)
            begin = time.monotonic()
            ran.wait(20)
            assert time.monotonic() - begin < 5
            answer.result()
        assert ran.returncode == 128 + signal.SIGTERM


@pytest.mark.slow
def test_the_process_reads_keys_from_its_environment(folder: Path) -> None:
    with process(folder, env={"RK_EXPORT_API_KEYS": "first-key-1"}) as (ran, url):
        assert httpx.get(f"{url}/v1/models").status_code == 401
        assert (
            httpx.get(f"{url}/v1/models", headers={"Authorization": "Bearer first-key-1"}).status_code == 200
        )
        ran.terminate()
        ran.wait(60)


@pytest.mark.slow
def test_a_bundle_that_cannot_be_opened_ends_the_process_with_its_message(
    folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for name in ("config.json", "tokenizer.json", "model.onnx"):
        (broken / name).write_bytes((folder / name).read_bytes())
    (broken / "generation_config.json").write_text('{"eos_token_id": "five"}')
    with process(broken) as (ran, _):
        _, log = ran.communicate(timeout=60)
        assert ran.returncode == 2
    assert "eos_token_id" in log
    assert "Traceback" not in log

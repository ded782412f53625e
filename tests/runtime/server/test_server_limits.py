"""What is refused before any work: keys, bodies, origins, strange JSON; and that no fault of ours tells about us."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_models import write_encoder
from serving import CPU, Running, error_of, serving, write_decoder

from rk_export.errors import InputError
from rk_export.runtime.server import app as app_module
from rk_export.runtime.server.logs import JsonFormatter
from rk_export.runtime.server.settings import ServerSettings, read_keys

KEYS = ("first-key-1", "second-key-2")
COMPLETION = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("bundles")
    return {"tiny": write_decoder(base / "tiny", ends=True), "enc": write_encoder(base / "enc")}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Running]:
    with serving(folders, max_body=1 << 16, max_tokens=8) as running:
        yield running


@pytest.fixture(scope="module")
def locked(folders: dict[str, Path]) -> Iterator[Running]:
    with serving({"tiny": folders["tiny"]}, keys=KEYS, cors=("https://page.example",)) as running:
        yield running


@pytest.mark.parametrize("path", ["/v1/models", "/v2", "/v2/models/tiny", "/v2/models/tiny/ready"])
@pytest.mark.parametrize(
    "header", [None, "Bearer wrong-key-3", "Basic first-key-1", "Bearer", "first-key-1", "Bearer é"]
)
def test_a_key_is_needed(locked: Running, path: str, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode()}
    answer = locked.get(path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "first-key" not in answer.text


def test_every_key_opens(locked: Running) -> None:
    for key in KEYS:
        assert locked.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert locked.client().completions.create(**COMPLETION).choices


def test_a_key_may_be_any_text(folders: dict[str, Path]) -> None:
    keys = ("schlüssel-eins", "clé-déjà")  # the last letter ends in a byte that Latin-1 takes for a space
    with serving({"tiny": folders["tiny"]}, keys=keys) as server:
        for key in keys:
            headers = {"Authorization": f"Bearer {key}".encode()}
            assert server.get("/v1/models", headers=headers).status_code == 200
        assert (
            server.get("/v1/models", headers={"Authorization": b"Bearer schl\xfcssel-eins"}).status_code
            == 401
        )


def test_probes_and_figures_need_no_key(locked: Running) -> None:
    for path in ("/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready", "/metrics"):
        assert locked.get(path).status_code == 200


def test_pages_of_other_origins_may_call_where_they_are_named(locked: Running, server: Running) -> None:
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    # Of which the last ones are OpenAI's client's own.
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-lang,x-stainless-os"
    allowed = httpx.options(f"{locked.url}/v1/completions", headers=asked)
    assert allowed.status_code == 200
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    other = httpx.options(
        f"{locked.url}/v1/completions", headers={**asked, "Origin": "https://other.example"}
    )
    assert "access-control-allow-origin" not in other.headers
    refused = locked.get("/v1/models", headers={"Origin": "https://page.example"})  # without a key
    assert refused.headers["access-control-allow-origin"] == "https://page.example"
    off = httpx.options(f"{server.url}/v1/completions", headers=asked)
    assert "access-control-allow-origin" not in off.headers


def test_keys_are_read_from_a_file_and_a_list(tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    file.write_text("# ours\nfirst-key-1\n\n  second-key-2  \n")
    assert read_keys(file, None) == KEYS
    assert read_keys(file, "third-key-3, first-key-1") == ("third-key-3", "first-key-1", "second-key-2")
    assert read_keys(None, None) == ()
    for listed in ("", " , "):  # an empty secret must not open the server
        with pytest.raises(InputError, match="VARIABLE: no key"):
            read_keys(None, listed, variable="VARIABLE")
    file.write_text("# none\n")
    with pytest.raises(InputError, match="no key"):
        read_keys(file, None)
    with pytest.raises(InputError, match="cannot be read"):
        read_keys(tmp_path / "absent", None)
    with pytest.raises(InputError, match="the least"):
        ServerSettings(keys=("short",))


@pytest.mark.parametrize(
    "field",
    [
        {"port": -1},
        {"port": 70000},
        {"max_tokens": 0},
        {"max_body": 5},
        {"timeout": 0.0},
        {"timeout": float("nan")},
        {"grace": -1.0},
    ],
)
def test_settings_out_of_range(field: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="out of range"):
        ServerSettings(**field)


def test_a_large_body_is_refused_before_it_is_parsed(server: Running) -> None:
    body = json.dumps({**COMPLETION, "prompt": "x" * (1 << 16)})

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000].encode()

    for content in (body, pieces()):  # with its length, and chunked without
        answer = httpx.post(
            f"{server.url}/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        assert answer.status_code == 413
        assert error_of(answer)["code"] == "body_too_large"


def test_more_tokens_than_the_server_allows(server: Running) -> None:
    answer = server.post("/v1/completions", {**COMPLETION, "max_tokens": 9})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "max_tokens")
    free = server.post("/v1/chat/completions", {key: CHAT[key] for key in ("model", "messages")}).json()
    assert free["usage"]["completion_tokens"] <= 8


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nothing",
        b"[]",
        b"5",
        b"null",
        b'{"model": "tiny", "prompt": ',
        b"\xff\xfe",
        b"[" * 60000,
        b'{"a":' * 9000 + b"1" + b"}" * 9000,
        json.dumps({**COMPLETION, "metadata": json.loads("[" * 80 + "]" * 80)}).encode(),
        b'{"model": "tiny", "prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "\\ud800", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "a", "top_k": 1e400}',
    ],
    ids=range(16),
)
def test_bodies_that_cannot_be_read(server: Running, body: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings"):
        answer = httpx.post(
            f"{server.url}{path}", content=body, headers={"Content-Type": "application/json"}, timeout=60
        )
        assert answer.status_code in (400, 404)
        error_of(answer)
    answer = httpx.post(f"{server.url}/v2/models/tiny/infer", content=body)
    assert answer.status_code == 400
    assert isinstance(answer.json()["error"], str)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("GET", "/docs", 404),
        ("GET", "/redoc", 404),
    ],
)
def test_wrong_routes_have_the_form_of_errors(server: Running, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, f"{server.url}{path}")
    assert answer.status_code == status
    error_of(answer)


def test_the_description_of_the_routes_holds_the_bodies(server: Running) -> None:
    found = server.get("/openapi.json").json()
    body = found["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]
    name = body["schema"]["$ref"].rpartition("/")[2]
    fields = found["components"]["schemas"][name]["properties"]
    assert {"messages", "tools", "response_format", "max_tokens"} <= set(fields)


def test_ids_go_in_and_out(server: Running) -> None:
    assert server.get("/v1/models", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"
    first, second = (server.get("/v1/models").headers["x-request-id"] for _ in range(2))
    assert first != second
    hostile = server.get("/v1/models", headers={"X-Request-Id": "a b<script>"}).headers["x-request-id"]
    assert "<" not in hostile


def test_the_log_has_ids_and_no_prompts(server: Running, caplog: pytest.LogCaptureFixture) -> None:
    secret = "my secret question"
    with caplog.at_level(logging.DEBUG):
        server.post("/v1/completions", {**COMPLETION, "prompt": secret}, headers={"X-Request-Id": "id-7"})
        server.until(lambda: any(record.getMessage() == "request" for record in caplog.records))
    lines = [json.loads(JsonFormatter().format(record)) for record in caplog.records]
    request = next(line for line in lines if line["message"] == "request")
    assert (request["route"], request["status"]) == ("/v1/completions", 200)
    answer = next(line for line in lines if line["message"] == "answer")
    assert (answer["new_tokens"], answer["model"]) == (2, "tiny")
    ours = [line for line in lines if line["logger"].startswith("rk_export")]
    assert secret not in json.dumps(ours)


def test_a_fault_of_ours_tells_nothing_but_its_id(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("secret/path/of/this/machine")

    monkeypatch.setattr(server.context.models, "find", broken)
    with caplog.at_level(logging.ERROR):
        answer = server.post("/v1/completions", COMPLETION, headers={"X-Request-Id": "id-8"})
    assert answer.status_code == 500
    found = error_of(answer)
    assert (found["code"], found["type"]) == ("internal_error", "server_error")
    assert "id-8" in found["message"]
    assert "secret" not in answer.text
    assert "secret/path" in caplog.text


def test_a_slow_body_is_not_waited_for(folders: dict[str, Path]) -> None:
    with serving({"tiny": folders["tiny"]}, timeout=0.3, session=CPU) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as slow:
            slow.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: 100\r\n\r\n{"
            )
            begin = time.monotonic()
            answer = slow.recv(4096)
        assert b" 408 " in answer.splitlines()[0]
        assert time.monotonic() - begin < 10


def test_the_page_loads_nothing_from_elsewhere(
    server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "index.html"
    page.write_text("<style>p{}</style><p>hi</p><script>go()</script>")
    shown = app_module.read_page(page)
    monkeypatch.setattr(app_module, "read_page", lambda: shown)
    answer = server.get("/")
    assert answer.text == page.read_text()
    policy = answer.headers["content-security-policy"]
    # From `printf 'go()' | openssl dgst -sha256 -binary | base64`.
    assert "script-src 'sha256-5KYv+PUboo5h+0+YAtGRPbwv5d/QxzHslP4YGnUaxRw='" in policy
    assert "connect-src 'self'" in policy
    assert "unsafe" not in policy
    monkeypatch.setattr(app_module, "read_page", lambda: None)
    assert server.get("/").status_code == 404


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop"),
    *("seed", "stream", "stream_options", "logprobs", "top_logprobs", "echo", "tools", "tool_choice"),
    *("response_format", "logit_bias", "stop_token_ids", "repetition_penalty", "chat_template_kwargs"),
    *("input", "encoding_format", "dimensions", "max_completion_tokens", "best_of", "suffix", "inputs"),
    *("outputs", "parameters", "id"),
]
INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["hi"]}]}
VALID: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", COMPLETION),
    ("/v1/chat/completions", CHAT),
    ("/v1/embeddings", {"model": "enc", "input": "hi"}),
    ("/v2/models/tiny/infer", {**INFER, "parameters": {"max_tokens": 2}}),
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=st.sampled_from(VALID), changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3))
def test_no_body_makes_the_server_fail(
    server: Running, case: tuple[str, dict[str, Any]], changes: dict[str, Any]
) -> None:
    path, body = case
    answer = server.post(path, {**body, **changes})
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200 and path.startswith("/v1"):
        error_of(answer)

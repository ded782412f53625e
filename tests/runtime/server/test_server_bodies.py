"""Which bodies are read, and which pages may reach a server for this machine alone."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI
from serving import Running, error_of, serving, write_decoder

from rk_export.runtime.server.app import create_app
from rk_export.runtime.server.hosts import LocalHosts, is_local
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.settings import ServerSettings

COMPLETION = {"model": "tiny", "prompt": "hi", "max_tokens": 2}
TEXT = {"name": "text", "shape": [1], "datatype": "BYTES", "data": ["hi"]}
INFER = {"inputs": [TEXT], "parameters": {"max_tokens": 2}}
# What a page may send to any server without asking it first: the Fetch standard's safelist, and no type at all.
SIMPLE = [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]
PAGE = {"Origin": "https://page.example"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_decoder(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Running]:
    with serving({"tiny": folder}) as running:
        yield running


def send(server: Running, path: str, body: Any, kind: str | None, **headers: str) -> httpx.Response:
    if kind is not None:
        headers["Content-Type"] = kind
    return server.http.post(f"{server.url}{path}", content=json.dumps(body), headers=headers)


@pytest.mark.parametrize("kind", SIMPLE)
@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", COMPLETION), ("/v2/models/tiny/infer", INFER)],
    ids=["completions", "infer"],
)
def test_no_page_of_another_site_makes_a_request(
    server: Running, path: str, body: dict[str, Any], kind: str | None
) -> None:
    before = server.decoder().engine.counters().requests
    assert send(server, path, body, kind, **PAGE).status_code == 415
    assert server.decoder().engine.counters().requests == before


@pytest.mark.parametrize("kind", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
def test_json_that_is_named_is_read(server: Running, kind: str) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v2/models/tiny/infer", INFER)):
        assert send(server, path, body, kind).status_code == 200


@pytest.mark.parametrize("kind", [None, "application/octet-stream"])
def test_tensors_as_bytes_are_read(server: Running, kind: str | None) -> None:
    raw = struct.pack("<I", 2) + b"hi"
    entry = {**TEXT, "parameters": {"binary_data_size": len(raw)}}
    del entry["data"]
    head = json.dumps({**INFER, "inputs": [entry]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    if kind is not None:
        headers["Content-Type"] = kind
    answer = httpx.post(f"{server.url}/v2/models/tiny/infer", content=head + raw, headers=headers)
    assert answer.status_code == 200
    assert send(server, "/v1/completions", COMPLETION, "application/octet-stream").status_code == 415


def test_a_compressed_body_is_refused_as_such(server: Running) -> None:
    for path, body in (("/v1/completions", COMPLETION), ("/v2/models/tiny/infer", INFER)):
        headers = {"Content-Encoding": "gzip"}
        assert send(server, path, body, "application/json", **headers).status_code == 415
        assert send(server, path, body, "application/json", **{"Content-Encoding": "identity"}).is_success


@pytest.mark.parametrize(
    "host", ["attacker.example", "attacker.example:8000", "127.0.0.1.nip.example", "x", "10.0.0.1"]
)
def test_a_name_that_only_leads_here_is_refused(server: Running, host: str) -> None:
    answer = server.get("/v1/models", headers={"Host": host})
    assert (answer.status_code, error_of(answer)["code"]) == (403, "host_not_allowed")
    for path in ("/", "/metrics", "/health/live"):
        assert server.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost:9", "127.0.0.1", "127.8.9.1:80", "[::1]", "[::1]:8000"]
)
def test_names_of_this_machine_are_answered(server: Running, host: str) -> None:
    assert server.get("/v1/models", headers={"Host": host}).status_code == 200


def test_openai_and_a_plain_name_still_work(server: Running) -> None:
    port = server.url.rpartition(":")[2]
    client = OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    assert client.completions.create(**COMPLETION).choices


def test_keys_keep_pages_out_by_themselves(folder: Path) -> None:
    with serving({"tiny": folder}, keys=("first-key-1",)) as server:
        headers = {"Host": "chat.example", "Authorization": "Bearer first-key-1"}
        assert server.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("address", "checked"), [("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), (None, False)]
)
def test_only_a_loopback_address_is_for_this_machine(
    folder: Path, address: str | None, checked: bool
) -> None:
    app = create_app(Models({"tiny": folder}, ServerSettings()), ServerSettings(), address=address)
    assert any(one.cls is LocalHosts for one in app.user_middleware) == checked
    assert not is_local("")

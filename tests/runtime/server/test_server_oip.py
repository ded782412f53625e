"""The Open Inference Protocol: JSON and binary tensors, against what the session itself gives.

`tests/triton_client_env` asks the same with Triton's own client.
"""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from runtime_models import write_encoder
from serving import Running, serving, write_decoder

from rk_export.runtime import EncoderSession, GenerationOptions, Session
from rk_export.runtime.server import oip, oip_arrays
from rk_export.runtime.text import TextCodec

HEADER = "Inference-Header-Content-Length"
PROMPTS = ["The harbour", "A ship"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("bundles")
    return {"tiny": write_decoder(base / "tiny"), "enc": write_encoder(base / "enc")}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path]) -> Iterator[Running]:
    with serving(folders) as running:
        yield running


@pytest.fixture(scope="module")
def session(folders: dict[str, Path]) -> Session:
    return Session.from_pretrained(folders["tiny"], provider="cpu", threads=1)


def tensor(name: str, datatype: str, data: Any, shape: list[int] | None = None) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape or list(np.shape(data)), "data": data}


def infer(server: Running, *inputs: dict[str, Any], model: str = "tiny", **more: Any) -> dict[str, Any]:
    answer = server.post(f"/v2/models/{model}/infer", {"inputs": list(inputs), **more})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_the_server_and_its_models_describe_themselves(server: Running) -> None:
    assert server.get("/v2").json()["extensions"] == ["binary_tensor_data"]
    for path in (
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/tiny/ready",
        "/v2/models/tiny/versions/1/ready",
    ):
        assert server.get(path).status_code == 200
    for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
        found = server.get(path).json()
        assert (found["name"], found["versions"]) == ("tiny", ["1"])
        assert {entry["name"] for entry in found["inputs"]} == {"text", "input_ids", "attention_mask"}
        assert {entry["name"] for entry in found["outputs"]} == {"text", "logits"}
    for path in ("/v2/models/absent", "/v2/models/tiny/versions/2", "/v2/models/absent/ready"):
        answer = server.get(path)
        assert answer.status_code == 404
        assert isinstance(answer.json()["error"], str)


def test_texts_are_continued(server: Running, session: Session) -> None:
    found = infer(
        server, tensor("text", "BYTES", PROMPTS), parameters={"max_tokens": 9, "temperature": 0}, id="7"
    )
    options = GenerationOptions(max_new_tokens=9)
    expected = [session.generate([prompt], options=options)[0].text for prompt in PROMPTS]
    assert found["outputs"] == [{"name": "text", "datatype": "BYTES", "shape": [2], "data": expected}]
    assert (found["id"], found["model_name"], found["model_version"]) == ("7", "tiny", "1")


def test_logits_are_the_sessions(server: Running, session: Session) -> None:
    ids = [[1, 2, 3, 4, 5], [9, 8, 7, 6, 5]]
    expected = session.prefill_logits(np.array(ids))
    (last,) = infer(server, tensor("input_ids", "INT64", ids))["outputs"]
    assert last["shape"] == [2, 258]
    np.testing.assert_allclose(np.reshape(last["data"], last["shape"]), expected[:, -1], atol=1e-4)
    (whole,) = infer(server, tensor("input_ids", "INT32", ids), parameters={"all_positions": True})["outputs"]
    assert whole["shape"] == [2, 5, 258]
    np.testing.assert_allclose(np.reshape(whole["data"], whole["shape"]), expected, atol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_a_row(server: Running, session: Session, side: str) -> None:
    short, width = [7, 6, 5], 5
    before, behind = ([0, 0], []) if side == "left" else ([], [0, 0])
    ids = [[1, 2, 3, 4, 5], [*before, *short, *behind]]
    mask = [[1] * width, [*before, 1, 1, 1, *behind]]
    given = (tensor("input_ids", "INT64", ids), tensor("attention_mask", "INT64", mask))
    alone = session.prefill_logits(np.array([short]))[0]
    (last,) = infer(server, *given)["outputs"]
    np.testing.assert_array_equal(np.reshape(last["data"], last["shape"]).astype(np.float32)[1], alone[-1])
    (whole,) = infer(server, *given, parameters={"all_positions": True})["outputs"]
    rows = np.reshape(whole["data"], whole["shape"]).astype(np.float32)
    start = len(before)
    np.testing.assert_array_equal(rows[1, start : start + 3], alone)
    assert not rows[1, [place for place in range(width) if not start <= place < start + 3]].any()


def test_tensors_as_bytes(server: Running, session: Session) -> None:
    ids = np.array([[1, 2, 3]], np.int64)
    text = b"The harbour"
    cases = [
        ("input_ids", "INT64", [1, 3], ids.tobytes()),
        ("text", "BYTES", [1], struct.pack("<I", len(text)) + text),
    ]
    for name, datatype, shape, raw in cases:
        entry = {
            "name": name,
            "datatype": datatype,
            "shape": shape,
            "parameters": {"binary_data_size": len(raw)},
        }
        parameters = {"binary_data_output": True}
        if name == "text":
            parameters |= {"max_tokens": 5, "temperature": 0}
        head = json.dumps({"inputs": [entry], "parameters": parameters}).encode()
        answer = httpx.post(
            f"{server.url}/v2/models/tiny/infer", content=head + raw, headers={HEADER: str(len(head))}
        )
        assert answer.status_code == 200, answer.text
        size = int(answer.headers[HEADER])
        (output,) = json.loads(answer.content[:size])["outputs"]
        rest = answer.content[size:]
        assert output["parameters"]["binary_data_size"] == len(rest)
        if name == "input_ids":
            expected = session.prefill_logits(ids)[:, -1]
            np.testing.assert_allclose(np.frombuffer(rest, "<f4").reshape(1, -1), expected, atol=1e-4)
        else:
            given = session.generate(["The harbour"], options=GenerationOptions(max_new_tokens=5))[0].text
            assert rest == struct.pack("<I", len(given.encode())) + given.encode()


def test_encoders(server: Running, folders: dict[str, Path]) -> None:
    encoder = EncoderSession.from_pretrained(folders["enc"], provider="cpu", threads=1)
    (vectors,) = infer(server, tensor("text", "BYTES", ["a", "bc"]), model="enc")["outputs"]
    np.testing.assert_allclose(
        np.reshape(vectors["data"], vectors["shape"]), encoder.embed(["a", "bc"]), atol=1e-6
    )
    (hidden,) = infer(server, tensor("input_ids", "INT64", [[5, 6]]), model="enc")["outputs"]
    assert hidden["name"] == "last_hidden_state"
    expected = encoder.forward(np.array([[5, 6]]))
    np.testing.assert_allclose(np.reshape(hidden["data"], hidden["shape"]), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({"inputs": []}, "inputs"),
        ({"inputs": [tensor("text", "BYTES", [5])]}, "texts"),
        ({"inputs": [tensor("text", "BYTES", ["a"], [2])]}, "shape"),
        ({"inputs": [tensor("text", "FP32", [1.0])]}, "datatype"),
        ({"inputs": [tensor("words", "BYTES", ["a"])]}, "input_ids"),
        ({"inputs": [tensor("input_ids", "INT64", [1, 2])]}, "batch, length"),
        ({"inputs": [tensor("input_ids", "INT64", [[1.5]])]}, "whole numbers"),
        ({"inputs": [tensor("input_ids", "INT64", [[10**30]])]}, "whole numbers"),
        ({"inputs": [tensor("input_ids", "INT64", [[5000]])]}, "5000"),
        ({"inputs": [tensor("input_ids", "INT64", [[1] * 2000])]}, "context"),
        ({"inputs": [tensor("input_ids", "INT64", [], [0, 5])]}, "batch, length"),
        ({"inputs": [tensor("input_ids", "INT64", [1], [-1])]}, "shape"),
        (
            {
                "inputs": [
                    tensor("input_ids", "INT64", [[1, 2, 3]]),
                    tensor("attention_mask", "INT64", [[1, 0, 1]]),
                ]
            },
            "side by side",
        ),
        ({"inputs": [tensor("text", "BYTES", ["a"])], "outputs": [{"name": "nothing"}]}, "nothing"),
        ({"inputs": [tensor("text", "BYTES", ["a"])], "parameters": {"stream": True}}, "stream"),
        ({"inputs": [tensor("text", "BYTES", ["a"])], "parameters": {"temperature": "hot"}}, "temperature"),
        ({"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}]}, "data"),
    ],
)
def test_what_cannot_be_done_is_refused(server: Running, body: dict[str, Any], word: str) -> None:
    answer = server.post("/v2/models/tiny/infer", body)
    assert answer.status_code == 400, answer.text
    assert word in answer.json()["error"]


@pytest.mark.parametrize("header", ["-1", "99999999", "five", "3", "1" * 5000, "²"])
def test_a_wrong_length_of_the_header(server: Running, header: str) -> None:
    body = json.dumps({"inputs": [tensor("text", "BYTES", ["a"])]})
    answer = httpx.post(f"{server.url}/v2/models/tiny/infer", content=body, headers={HEADER: header.encode()})
    assert answer.status_code == 400


@pytest.mark.parametrize("raw", [b"\x05\x00", b"\x05\x00\x00\x00ab", b"\x01\x00\x00\x00\xff", b""])
def test_broken_bytes(server: Running, raw: bytes) -> None:
    entry = {"name": "text", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(raw)}}
    head = json.dumps({"inputs": [entry]}).encode()
    answer = httpx.post(
        f"{server.url}/v2/models/tiny/infer", content=head + raw, headers={HEADER: str(len(head))}
    )
    assert answer.status_code == 400


@pytest.mark.parametrize("name", ["embedding", "last_hidden_state", "logits"])
def test_an_output_of_other_inputs_is_refused_before_anything_runs(server: Running, name: str) -> None:
    before = server.decoder().engine.counters().requests
    body = {"inputs": [tensor("text", "BYTES", ["a"])], "outputs": [{"name": name}]}
    assert name in server.post("/v2/models/tiny/infer", body).json()["error"]
    twice = server.post("/v2/models/tiny/infer", {**body, "outputs": [{"name": "text"}] * 2})
    assert (twice.status_code, "2 times" in twice.json()["error"]) == (400, True)
    assert server.decoder().engine.counters().requests == before


def test_an_encoder_needs_a_text(server: Running) -> None:
    answer = server.post("/v2/models/enc/infer", {"inputs": [tensor("text", "BYTES", [], [0])]})
    assert answer.status_code == 400, answer.text
    assert "no texts" in answer.json()["error"]


def test_an_encoder_runs_few_rows_at_once(
    server: Running, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(0).integers(1, 250, (37, 5))
    mask = np.ones_like(ids)
    mask[::3, 3:] = 0
    expected = EncoderSession.from_pretrained(folders["enc"], provider="cpu", threads=1).forward(ids, mask)
    before, sizes = EncoderSession.forward, []

    def noted(session: EncoderSession, ids: np.ndarray, *rest: Any) -> np.ndarray:
        sizes.append(len(ids))
        return before(session, ids, *rest)

    monkeypatch.setattr(EncoderSession, "forward", noted)
    given = (tensor("input_ids", "INT64", ids.tolist()), tensor("attention_mask", "INT64", mask.tolist()))
    (hidden,) = infer(server, *given, model="enc")["outputs"]
    np.testing.assert_allclose(np.reshape(hidden["data"], hidden["shape"]), expected, atol=1e-6)
    assert max(sizes) <= 16 < sum(sizes)


@pytest.mark.parametrize(
    ("model", "given", "more", "size"),
    [
        ("tiny", tensor("input_ids", "INT64", [[1, 2]]), {}, 258 * 4),
        ("tiny", tensor("input_ids", "INT64", [[1, 2]]), {"all_positions": True}, 2 * 258 * 4),
        ("enc", tensor("input_ids", "INT64", [[1, 2]]), {}, 2 * 8 * 4),
        ("enc", tensor("text", "BYTES", ["a", "b", "c"]), {}, 3 * 8 * 4),
    ],
    ids=["last", "whole", "hidden", "text"],
)
def test_arrays_have_a_bound_which_is_lower_as_json(
    server: Running,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    given: dict[str, Any],
    more: dict[str, bool],
    size: int,
) -> None:
    def status(*, json_bytes: int, bytes_: int, binary: bool) -> int:
        monkeypatch.setattr(oip_arrays, "_MOST_JSON_BYTES", json_bytes)
        monkeypatch.setattr(oip_arrays, "_MOST_BYTES", bytes_)
        body = {"inputs": [given], "parameters": {**more, "binary_data_output": binary}}
        return server.post(f"/v2/models/{model}/infer", body).status_code

    assert oip_arrays._MOST_BYTES == 16 * oip_arrays._MOST_JSON_BYTES == 256 << 20
    assert status(json_bytes=size, bytes_=size, binary=False) == 200
    assert status(json_bytes=size - 1, bytes_=size, binary=False) == 400
    assert status(json_bytes=size - 1, bytes_=size, binary=True) == 200
    assert status(json_bytes=size - 1, bytes_=size - 1, binary=True) == 400


def test_a_large_request_holds_up_no_probe(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()

    def noted(function: Any) -> Any:
        def inner(*args: Any, **more: Any) -> Any:
            threads.add(threading.current_thread())
            return function(*args, **more)

        return inner

    monkeypatch.setattr(oip, "read_inference", noted(oip.read_inference))
    monkeypatch.setattr(oip, "tokens_of", noted(oip.tokens_of))
    monkeypatch.setattr(TextCodec, "encode", noted(TextCodec.encode))
    infer(server, tensor("text", "BYTES", ["a"]), model="enc")
    infer(server, tensor("input_ids", "INT64", [[1, 2]]), model="enc")
    assert len(threads) >= 1
    assert server.server_thread not in threads

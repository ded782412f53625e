"""Triton's own HTTP client against `rk-export serve`: the Open Inference Protocol, JSON and binary tensors.

Runs in an environment of its own (``make test-triton-client``). The variable RK_PYTHON names the Python of the
environment in which rk-export is installed: it serves.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.http", reason="needs tritonclient: run `make test-triton-client`")

import numpy as np
import tritonclient.http as http
from tritonclient.utils import InferenceServerException


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("served")
    script = Path(__file__).with_name("write_reference.py")
    subprocess.run([os.environ["RK_PYTHON"], str(script), str(found)], check=True)
    return found


@pytest.fixture(scope="module")
def reference(folder: Path) -> dict[str, Any]:
    arrays = np.load(folder / "reference.npz")
    return {**json.loads((folder / "reference.json").read_text()), **{name: arrays[name] for name in arrays}}


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Any]:
    words = [
        os.environ["RK_PYTHON"],
        "-m",
        "rk_export.cli.main",
        "serve",
        str(folder / "tiny"),
        str(folder / "enc"),
    ]
    more = ["--port", "0", "--provider", "cpu", "--threads", "1", "--quiet"]
    with subprocess.Popen([*words, *more], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split(" ")[0]
            with http.InferenceServerClient(url.removeprefix("http://")) as found:
                yield found
        finally:
            server.terminate()
            assert server.wait(60) == 0


def ids_input(ids: np.ndarray, *, binary: bool) -> Any:
    tensor = http.InferInput("input_ids", list(ids.shape), "INT64")
    tensor.set_data_from_numpy(ids.astype(np.int64), binary_data=binary)
    return tensor


def test_server_and_models_are_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("tiny")
    assert client.is_model_ready("tiny", "1")
    assert not client.is_model_ready("absent")
    assert client.get_server_metadata()["name"] == "rk-export"
    found = client.get_model_metadata("tiny")
    assert found["versions"] == ["1"]
    assert {entry["name"] for entry in found["outputs"]} == {"text", "logits"}


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_logits_of_the_last_position(
    client: Any, reference: dict[str, Any], binary: bool, named: bool
) -> None:
    outputs = [http.InferRequestedOutput("logits", binary_data=binary)] if named else None
    found = client.infer("tiny", [ids_input(reference["ids"], binary=binary)], outputs=outputs)
    logits = found.as_numpy("logits")
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference["logits"][:, -1], atol=1e-4)


def test_logits_of_all_positions(client: Any, reference: dict[str, Any]) -> None:
    given = [ids_input(reference["ids"], binary=True)]
    found = client.infer("tiny", given, parameters={"all_positions": True}).as_numpy("logits")
    np.testing.assert_allclose(found, reference["logits"], atol=1e-4)


@pytest.mark.parametrize("binary", [True, False])
def test_texts(client: Any, reference: dict[str, Any], binary: bool) -> None:
    prompts = np.array([prompt.encode() for prompt in reference["prompts"]], np.object_)
    tensor = http.InferInput("text", [len(prompts)], "BYTES")
    tensor.set_data_from_numpy(prompts, binary_data=binary)
    output = http.InferRequestedOutput("text", binary_data=binary)
    parameters = {"max_tokens": reference["tokens"], "temperature": 0}
    found = client.infer("tiny", [tensor], outputs=[output], request_id="7", parameters=parameters)
    assert found.get_response()["id"] == "7"
    texts = [item.decode() if isinstance(item, bytes) else item for item in found.as_numpy("text")]
    assert texts == reference["texts"]


def test_vectors_of_an_encoder(client: Any, reference: dict[str, Any]) -> None:
    tensor = http.InferInput("text", [1], "BYTES")
    tensor.set_data_from_numpy(np.array([b"harbour"], np.object_))
    found = client.infer("enc", [tensor]).as_numpy("embedding")
    np.testing.assert_allclose(found, reference["vectors"], atol=1e-6)


def test_requests_side_by_side(client: Any, reference: dict[str, Any]) -> None:
    asked = [client.async_infer("tiny", [ids_input(reference["ids"], binary=True)]) for _ in range(4)]
    for one in asked:
        np.testing.assert_allclose(one.get_result().as_numpy("logits"), reference["logits"][:, -1], atol=1e-4)


def test_refusals_are_the_clients_own_errors(client: Any, reference: dict[str, Any]) -> None:
    with pytest.raises(InferenceServerException, match="no model is named 'absent'"):
        client.infer("absent", [ids_input(reference["ids"], binary=True)])
    with pytest.raises(InferenceServerException, match="99999"):
        client.infer("tiny", [ids_input(np.array([[99999]]), binary=True)])

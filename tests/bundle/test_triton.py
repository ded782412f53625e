"""The Triton configuration of real bundles: exactly the inputs and outputs that the session has."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime as ort
import pytest
from conftest import tiny_options
from tiny_models import tiny_model

from rk_export import Run, compress, deployment_files, export

pytestmark = pytest.mark.whole

ENTRY = re.compile(
    r'^(input|output) \[ \{ name: "([^"]+)", data_type: TYPE_(\w+), dims: \[ ([^\]]*) \] \} \]$', re.M
)
TYPES = {"INT64": "tensor(int64)", "FP32": "tensor(float)", "FP16": "tensor(float16)"}
Tensor = tuple[str, str, list[int]]


def configured(text: str, role: str) -> list[Tensor]:
    """Return name, type and shape after the batch of the tensors in a config.pbtxt."""
    return [
        (name, TYPES[kind], [int(size) for size in dims.split(",") if size.strip()])
        for found, name, kind, dims in ENTRY.findall(text)
        if found == role
    ]


def of_session(values: list[ort.NodeArg]) -> list[Tensor]:
    return [
        (value.name, value.type, [size if isinstance(size, int) else -1 for size in value.shape[1:]])
        for value in values
    ]


def assert_served(bundle: Path) -> None:
    (repository,) = deployment_files(bundle, ["triton"])
    place = repository / bundle.name
    text = (place / "config.pbtxt").read_text(encoding="utf-8")
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    session = ort.InferenceSession(place / "1" / "model.onnx" / "model.onnx", settings)
    for role, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
        assert configured(text, role) == of_session(values)
        assert text.count(f"{role} [") == len(values)


def test_a_quantized_bundle(llama: Path, tmp_path: Path) -> None:
    compress(llama, tmp_path / "out", tiny_options(), run=Run(threads=1))
    assert_served(tmp_path / "out")


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_learned_positions_and_encoders(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", run=Run(threads=1))
    assert_served(tmp_path / "out")


def test_half_precision(llama: Path, tmp_path: Path) -> None:
    compress(llama, tmp_path / "out", tiny_options(ep="portable"), run=Run(threads=1))
    assert_served(tmp_path / "out")

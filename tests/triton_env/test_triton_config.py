"""The configurations that we write, read by Triton's own protobuf, against the sessions that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient", reason="needs tritonclient: run `make test-triton`")

import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper
from runtime_models import CONTEXT, HIDDEN, TinyDecoder, write_encoder
from tritonclient.grpc import model_config_pb2

from rk_export import deployment_files
from rk_export.manifest import write_manifest

TYPES = {"TYPE_INT64": "tensor(int64)", "TYPE_FP32": "tensor(float)", "TYPE_FP16": "tensor(float16)"}
Tensor = tuple[str, str, list[int]]


def parsed(place: Path) -> Any:
    config = model_config_pb2.ModelConfig()
    return text_format.Parse((place / "config.pbtxt").read_text(encoding="utf-8"), config)


def configured(tensors: Any) -> list[Tensor]:
    return [
        (one.name, TYPES[model_config_pb2.DataType.Name(one.data_type)], list(one.dims)) for one in tensors
    ]


def of_session(values: list[ort.NodeArg]) -> list[Tensor]:
    return [
        (value.name, value.type, [size if isinstance(size, int) else -1 for size in value.shape[1:]])
        for value in values
    ]


def add_positions(folder: Path) -> None:
    """Give the graph an input `position_ids` that reads learned positions."""
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    (lookup,) = (node for node in graph.node if node.op_type == "Gather" and node.input[1] == "input_ids")
    table = np.random.default_rng(1).standard_normal((CONTEXT, HIDDEN)).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(table, "positions"))
    graph.input.insert(2, helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["B", "S"]))
    place, embedded = list(graph.node).index(lookup) + 1, lookup.output[0]
    lookup.output[0] = "tokens"
    graph.node.insert(place, helper.make_node("Add", ["tokens", "placed"], [embedded]))
    graph.node.insert(place, helper.make_node("Gather", ["positions", "position_ids"], ["placed"]))
    onnx.save(model, folder / "model.onnx")


def write_form(form: str, folder: Path) -> None:
    forms = {
        "without logits_start": TinyDecoder(logits_start=False),
        "plain attention": TinyDecoder(grouped=False),
        "quantized": TinyDecoder(quantized_head=True, external=True),
    }
    if form == "encoder":
        write_encoder(folder)
    else:
        forms.get(form, TinyDecoder()).write(folder)
    if form == "position_ids":
        add_positions(folder)


@pytest.mark.parametrize(
    "form",
    ["logits_start", "without logits_start", "position_ids", "plain attention", "quantized", "encoder"],
)
def test_the_onnxruntime_backend_is_told_what_the_session_has(form: str, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write_form(form, folder)
    write_manifest(folder, {"ep": "cpu"})
    (repository,) = deployment_files(folder, ["triton"])
    config = parsed(repository / "tiny")
    session = ort.InferenceSession(repository / "tiny" / "1" / "model.onnx" / "model.onnx")
    assert configured(config.input) == of_session(session.get_inputs())
    assert configured(config.output) == of_session(session.get_outputs())
    names = {value.name for value in session.get_inputs()}
    assert "logits_start" not in names
    overridable = [value.name for value in session.get_overridable_initializers()]
    assert ("logits_start" in overridable) == (form not in ("without logits_start", "encoder"))
    assert ("position_ids" in names) == (form == "position_ids")
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 8)


def test_the_python_backend_is_told_to_expect_several_responses(tmp_path: Path) -> None:
    TinyDecoder().write(tmp_path / "tiny")
    write_manifest(tmp_path / "tiny", {"ep": "cpu"})
    (repository,) = deployment_files(tmp_path / "tiny", ["triton-python"])
    config = parsed(repository / "tiny")
    assert (config.backend, config.max_batch_size) == ("python", 0)
    assert config.model_transaction_policy.decoupled
    assert all(tensor.optional for tensor in config.input)
    (group,) = config.instance_group
    assert group.count == 1

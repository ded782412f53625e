"""The folder for transformers.js: its files, what becomes of the graph and the tokenizer, and what is refused."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from deployable import write_deployable
from onnx import TensorProto, helper
from runtime_models import HEAD, KV_HEADS, TEMPLATE, TinyDecoder, byte_tokenizer, write_encoder

from rk_export import InputError, deployment_files
from rk_export.bundle.targets.base import Deployment
from rk_export.bundle.targets.js_graph import BATCH, KEPT, dtype_of, name_batch, rename_data
from rk_export.bundle.targets.transformers_js import write_folder
from rk_export.manifest import check_manifest, write_manifest


def bundle(folder: Path, **form: Any) -> Path:
    """Write a bundle of a form of TinyDecoder, whose config names a model type."""
    TinyDecoder(**{"external": True, **form}).write(folder)
    change(folder / "config.json", model_type="llama")
    return folder


def change(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder beside the bundle."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return bundle(tmp_path / "bundle")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("model_type", "name", "value"),
    [("exaone", "num_layers", 2), ("granitemoehybrid", "layer_types", ["attention"] * 2)],
)
def test_fields_are_spelled_as_transformers_js_reads_them(
    folder: Path, place: Path, model_type: str, name: str, value: object
) -> None:
    change(folder / "config.json", model_type=model_type, num_hidden_layers=2)
    write_folder(Deployment(folder, "tiny"), place)
    assert read(place / "config.json")[name] == value


def test_the_files_and_their_names(folder: Path, place: Path) -> None:
    write_folder(Deployment(folder, "tiny"), place)
    configs = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files(place) == configs | {"onnx/model.onnx", "onnx/model.onnx_data"}
    for copy, source in (
        ("onnx/model.onnx_data", "model.onnx.data"),
        *((name, name) for name in ("tokenizer.json", "generation_config.json")),
    ):
        assert (place / copy).samefile(folder / source)
    written = read(place / "config.json")
    assert written.pop("transformers.js_config") == {"dtype": "fp32", "use_external_data_format": 1}
    assert written == read(folder / "config.json")


def test_the_name_follows_the_format(tmp_path: Path, place: Path) -> None:
    made = bundle(tmp_path / "bundle", quantized_head=True)
    write_folder(Deployment(made, "tiny"), place)
    assert files(place / "onnx") == {"model_q4.onnx", "model_q4.onnx_data"}
    assert read(place / "config.json")["transformers.js_config"]["dtype"] == "q4"
    graph = onnx.load(place / "onnx" / "model_q4.onnx", load_external_data=False).graph
    assert set(locations(graph)) == {"model_q4.onnx_data"}


def test_a_graph_with_its_weights_inside_needs_no_other_file(tmp_path: Path, place: Path) -> None:
    write_folder(Deployment(bundle(tmp_path / "bundle", external=False), "tiny"), place)
    assert files(place / "onnx") == {"model.onnx"}
    assert read(place / "config.json")["transformers.js_config"]["use_external_data_format"] == 0


def locations(graph: onnx.GraphProto) -> Iterator[str]:
    for tensor in graph.initializer:
        yield from (entry.value for entry in tensor.external_data if entry.key == "location")


def opened(model: Path) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def logits(session: ort.InferenceSession, ids: np.ndarray, **more: np.ndarray) -> np.ndarray:
    empty = np.zeros((len(ids), KV_HEADS, 0, HEAD), np.float32)
    names = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **dict.fromkeys(names, empty), **more}
    found: np.ndarray = session.run(["logits"], feeds)[0]
    return found


def test_the_graph_computes_the_same_and_keeps_as_many_logits_as_it_is_told(
    folder: Path, place: Path
) -> None:
    write_folder(Deployment(folder, "tiny"), place)
    served = opened(place / "onnx" / "model.onnx")
    ids = np.arange(10, 22, dtype=np.int64).reshape(2, 6)
    every = logits(opened(folder / "model.onnx"), ids)
    for kept, first in ((0, 0), (1, 5), (4, 2), (6, 0), (99, 0)):
        found = logits(served, ids, **{KEPT: np.array(kept, np.int64)})
        np.testing.assert_array_equal(found, every[:, first:])


def test_every_batch_dimension_has_the_name_that_the_cache_is_made_from(folder: Path, place: Path) -> None:
    write_folder(Deployment(folder, "tiny"), place)
    served = opened(place / "onnx" / "model.onnx")
    inputs = {value.name: value.shape for value in served.get_inputs()}
    assert inputs.pop(KEPT) == []
    shapes = [*inputs.values(), *(value.shape for value in served.get_outputs())]
    assert {shape[0] for shape in shapes} == {BATCH}
    # transformers.js takes every other name for 0, which is right for the length of the first cache.
    assert {tuple(shape[1:]) for name, shape in inputs.items() if "past" in name} == {(KV_HEADS, "P", HEAD)}
    assert not served.get_overridable_initializers()


def test_only_the_batch_dimension_is_renamed() -> None:
    make = helper.make_tensor_value_info
    inputs = [
        make("mask", TensorProto.INT64, ["rows", "total"]),
        make("input_ids", TensorProto.INT64, ["rows", "n"]),
    ]
    inside = make("h", TensorProto.FLOAT, ["n", "rows"])
    graph = helper.make_graph([], "g", inputs, [], value_info=[inside])
    name_batch(graph)
    dims = [[one.dim_param for one in value.type.tensor_type.shape.dim] for value in (*graph.input, inside)]
    assert dims[:2] == [[BATCH, "total"], [BATCH, "n"]]
    assert [one.dim_param for one in graph.value_info[0].type.tensor_type.shape.dim] == ["n", BATCH]


def packed(kind: str, **attributes: int) -> onnx.NodeProto:
    return helper.make_node(kind, ["x", "w"], ["y"], domain="com.microsoft", **attributes)


@pytest.mark.parametrize(
    ("nodes", "floats", "dtype"),
    [
        ([], "FLOAT", "fp32"),
        ([], "FLOAT16", "fp16"),
        ([packed("MatMulNBits", bits=4)], "FLOAT", "q4"),
        ([packed("MatMulNBits")], "FLOAT", "q4"),
        ([packed("MatMulNBits", bits=4), packed("GatherBlockQuantized", bits=8)], "FLOAT16", "q4f16"),
        ([packed("MatMulNBits", bits=2), packed("MatMulNBits", bits=8)], "FLOAT", "q2"),
        ([packed("MatMulNBits", bits=2)], "FLOAT16", "q2f16"),
        ([packed("MatMulNBits", bits=8)], "FLOAT", "q8"),
        ([packed("MatMulNBits", bits=8)], "FLOAT16", "q8"),
        ([packed("MatMulIntegerToFloat")], "FLOAT", "q8"),
    ],
)
def test_the_fewest_bits_and_the_floats_make_the_format(
    nodes: list[onnx.NodeProto], floats: str, dtype: str
) -> None:
    kind = TensorProto.DataType.Value(floats)
    cache = [helper.make_tensor_value_info("past_key_values.0.key", kind, ["B", 2, "P", 16])]
    assert dtype_of(helper.make_graph(nodes, "g", cache, [])) == dtype


def test_several_files_of_weights_are_numbered() -> None:
    tensors = []
    for name in ("b", "a", "c"):
        tensor = TensorProto(name=name, data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value=f"{name}.data")
        tensors.append(tensor)
    graph = helper.make_graph([], "g", [], [], tensors)
    names = {"a.data": "m.onnx_data", "b.data": "m.onnx_data_1", "c.data": "m.onnx_data_2"}
    assert rename_data(graph, "m.onnx") == names
    assert list(locations(graph)) == ["m.onnx_data_1", "m.onnx_data", "m.onnx_data_2"]


def test_the_chat_template_lies_in_the_tokenizers_config(folder: Path, place: Path) -> None:
    write_folder(Deployment(folder, "tiny"), place)
    written = read(place / "tokenizer_config.json")
    assert written["chat_template"] == TEMPLATE
    assert written["bos_token"] == {"content": "<bos>"}
    assert written["add_bos_token"] is True


def test_several_templates_keep_their_names(folder: Path, place: Path) -> None:
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("{{ tools }}")
    write_folder(Deployment(folder, "tiny"), place)
    assert read(place / "tokenizer_config.json")["chat_template"] == [
        {"name": "default", "template": TEMPLATE},
        {"name": "tool_use", "template": "{{ tools }}"},
    ]


def test_special_tokens_of_the_other_file_come_along(folder: Path, place: Path) -> None:
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "<end>"}))
    write_folder(Deployment(folder, "tiny"), place)
    written = read(place / "tokenizer_config.json")
    assert (written["pad_token"], written["eos_token"]) == ("<pad>", "<end>")


def test_an_encoder_has_no_template_and_no_logits(tmp_path: Path, place: Path) -> None:
    made = write_encoder(tmp_path / "encoder")
    change(made / "config.json", model_type="bert")
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = None
    tokenizer.save(str(made / "tokenizer.json"))
    write_folder(Deployment(made, "tiny"), place)
    assert read(place / "tokenizer_config.json") == {"add_bos_token": False}
    served = opened(place / "onnx" / "model.onnx")
    assert [value.name for value in served.get_inputs()] == ["input_ids", "attention_mask"]


def test_copies_where_there_are_no_hard_links(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    write_folder(Deployment(folder, "tiny"), place)
    copy, source = place / "onnx" / "model.onnx_data", folder / "model.onnx.data"
    assert copy.read_bytes() == source.read_bytes()
    assert not copy.samefile(source)


def test_a_file_that_no_browser_reads_is_said(
    folder: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(2**31)  # takes no space on the disk
    with caplog.at_level(logging.WARNING):
        write_folder(Deployment(folder, "tiny"), place)
    assert "model.onnx.data: larger than 2 GiB: Node loads it, browsers do not" in caplog.text


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda made: change(made / "config.json", model_type="mixtral"),
            "no class for the model type 'mixtral'",
        ),
        (lambda made: (made / "config.json").unlink(), "no class for the model type None"),
        (lambda made: (made / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda made: (made / "model.onnx").unlink(), "model.onnx is missing"),
    ],
    ids=["family", "config", "tokenizer", "graph"],
)
def test_what_transformers_js_could_not_load_is_refused_first(
    folder: Path, place: Path, damage: Any, message: str
) -> None:
    damage(folder)
    with pytest.raises(InputError) as refusal:
        write_folder(Deployment(folder, "tiny"), place)
    assert message in str(refusal.value)
    assert not list(place.iterdir())


def test_the_manifest_lists_the_folder(folder: Path) -> None:
    write_manifest(folder, {"ep": "cpu"})
    assert deployment_files(folder, ["transformers.js"]) == (folder / "transformers.js",)
    listed = {name for name in check_manifest(folder)["files"] if name.startswith("transformers.js/")}
    assert listed == {f"transformers.js/{name}" for name in files(folder / "transformers.js")}


def test_a_bundle_without_a_family_is_left_as_it_was(tmp_path: Path) -> None:
    made = write_deployable(tmp_path / "tiny")
    before = files(made)
    with pytest.raises(InputError, match="no class for the model type None"):
        deployment_files(made, ["transformers.js"])
    assert files(made) == before

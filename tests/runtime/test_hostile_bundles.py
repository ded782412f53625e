"""Bundles from strangers: what their graph and configuration name stays in their folder, and is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.external_data_helper import set_external_data
from runtime_models import TinyDecoder, write_encoder

from rk_export.errors import InputError
from rk_export.manifest import write_manifest
from rk_export.runtime import EncoderSession, Session
from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.chat_files import TemplateFiles
from rk_export.runtime.contestants import genai_settings
from rk_export.runtime.graph_proto import check_graph

IDS = np.arange(1, 5)[None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = TinyDecoder(external=True).write(tmp_path / "bundle")
    (tmp_path / "secret.bin").write_bytes(bytes(1 << 20))
    return folder


def changed(folder: Path, **values: str) -> None:
    """Give every external tensor other values: location, offset, length."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = values.get(entry.key, entry.value)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def refused(folder: Path, message: str, **options: Any) -> None:
    for level in (None, 0):
        with pytest.raises(InputError, match=message) as refusal:
            Session.from_pretrained(folder, provider="cpu", accuracy_level=level, **options)
        assert "ONNX Runtime" not in str(refusal.value)


@pytest.mark.parametrize(
    "place",
    ["{secret}", "../secret.bin", "x/../../secret.bin", "..\\secret.bin", "C:\\secret.bin", "//x/secret"],
)
def test_external_data_outside_the_folder_are_refused(folder: Path, place: str) -> None:
    changed(folder, location=place.format(secret=folder.parent / "secret.bin"))
    refused(folder, "names a file outside the folder")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"location": ""}, "no name of a file"),
        ({"location": "absent"}, "cannot be read"),
        ({"location": "."}, "no regular file"),
        ({"length": "99999999"}, "reads 99,999,999 bytes from byte"),
        ({"offset": "99999999"}, "from byte 99,999,999 of model.onnx.data, which has"),
        ({"offset": "-1"}, "offset of an external tensor is '-1'"),
        ({"offset": "9" * 30}, "offset of an external tensor is"),
        ({"length": "1e3"}, "length of an external tensor is '1e3'"),
    ],
)
def test_external_data_that_are_not_there_are_refused(
    folder: Path, values: dict[str, str], message: str
) -> None:
    changed(folder, **values)
    refused(folder, message)


def test_links_out_of_the_folder_are_refused(folder: Path) -> None:
    data = folder / "model.onnx.data"
    data.rename(folder.parent / "away")
    data.symlink_to(folder.parent / "away")
    refused(folder, "a link that leads out of the folder")
    with pytest.raises(InputError, match="a link that leads out"):
        check_graph(folder / "model.onnx")
    data.unlink()
    data.symlink_to("model.onnx.data")  # to itself
    refused(folder, "cannot be read")
    data.unlink()
    os.mkfifo(data)
    refused(folder, "no regular file")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.onnx", "more"])
def test_any_link_out_of_a_bundle_is_refused(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(folder.parent / "secret.bin")
    refused(folder, rf"{name}: a link that leads out of the folder")


def test_a_template_without_an_end_is_not_read(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    os.mkfifo(folder / "additional_chat_templates" / "rag.jinja")
    with pytest.raises(InputError, match=r"rag\.jinja: no file"):
        TemplateFiles.read(folder)
    (folder / "additional_chat_templates" / "rag.jinja").unlink()
    (folder / "chat_template.jinja").write_text("x" * ((1 << 20) + 1))
    with pytest.raises(InputError, match="too large for a chat template"):
        TemplateFiles.read(folder)


def test_tensors_of_subgraphs_functions_and_attributes_are_looked_at(tmp_path: Path) -> None:
    """Wherever a tensor stands in the file, it is found."""

    def outside() -> Any:
        tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], b"\0\0\0\0", raw=True)
        set_external_data(tensor, "../secret.bin")
        tensor.ClearField("raw_data")
        return tensor

    node = helper.make_node("Constant", [], ["y"], value=outside())
    inner = helper.make_graph(
        [node], "inner", [], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])]
    )
    branch = helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner)
    sparse = helper.make_sparse_tensor(outside(), helper.make_tensor("i", TensorProto.INT64, [1], [0]), [1])
    empty = helper.make_graph([], "empty", [], [])
    function = helper.make_function("d", "f", [], ["y"], [node], [helper.make_opsetid("", 21)])
    graphs = {
        "attribute": helper.make_graph([node], "g", [], []),
        "subgraph": helper.make_graph([branch], "g", [], []),
        "sparse": helper.make_graph([], "g", [], [], sparse_initializer=[sparse]),
    }
    models = {name: helper.make_model(graph) for name, graph in graphs.items()}
    models["function"] = helper.make_model(empty, functions=[function])
    for name, model in models.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(model.SerializeToString())
        with pytest.raises(InputError, match="outside the folder"):
            check_graph(path)


def test_checksums_are_compared_when_asked(tmp_path: Path) -> None:
    folders = (
        (Session, TinyDecoder(external=True).write(tmp_path / "decoder")),
        (EncoderSession, write_encoder(tmp_path / "encoder")),
    )
    for kind, folder in folders:
        with pytest.raises(InputError, match=r"rk_manifest\.json is missing"):
            kind.from_pretrained(folder, provider="cpu", check=True)
        write_manifest(folder, {})
        kind.from_pretrained(folder, provider="cpu", check=True)
        config = folder / "config.json"
        config.write_text(config.read_text().replace("1", "2", 1))
        kind.from_pretrained(folder, provider="cpu")
        with pytest.raises(InputError, match=r"config\.json: corrupted: its checksum"):
            kind.from_pretrained(folder, provider="cpu", check=True)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        (
            "config.json",
            {"max_position_embeddings": "many"},
            "max_position_embeddings is 'many', a whole number",
        ),
        ("config.json", {"max_position_embeddings": -5}, "max_position_embeddings is -5"),
        ("config.json", {"max_position_embeddings": 10**30}, "max_position_embeddings is 1000"),
        ("config.json", {"vocab_size": True}, "vocab_size is True"),
        ("config.json", {"text_config": 3}, "text_config is 3, an object"),
        ("genai_config.json", {"model": []}, r"model is \[\], an object"),
        ("genai_config.json", {"model": {"decoder": "x"}}, "decoder is 'x', an object"),
        ("genai_config.json", {"search": {"past_present_share_buffer": 1}}, "is 1, true or false"),
        ("rk_manifest.json", {"shared_kv_cache": "yes"}, "is 'yes', true or false"),
    ],
)
def test_a_value_of_another_type_is_refused(folder: Path, file: str, values: Any, message: str) -> None:
    (folder / file).write_text(json.dumps(values))
    with pytest.raises(InputError, match=message) as refusal:
        BundleConfig.read(folder)
    assert file in str(refusal.value.where)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"filename": "../model.onnx"}, "outside the folder"),
        ({"filename": "absent.onnx"}, "cannot be read"),
        ({"filename": "other.onnx"}, "outside the folder"),
        ({"session_options": {"enable_profiling": "/tmp/x"}}, "has GenAI write files"),
        ({"session_options": {"config_entries": {"ep.context_file_path": "x"}}}, "has GenAI write files"),
        ({"session_options": {"anything": "/etc/passwd"}}, "outside the folder"),
        ({"session_options": {"custom_ops_library": "x.so"}}, "native code"),
    ],
)
def test_what_genai_would_open_is_looked_at_first(folder: Path, decoder: Any, message: str) -> None:
    (folder / "other.onnx").write_bytes((folder / "model.onnx").read_bytes())
    sizes = {"vocab_size": 258, "context_length": 96}
    config = {"model": {**sizes, "decoder": {"filename": "model.onnx"}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    assert genai_settings(folder) == (258, 96)
    if decoder.get("filename") == "other.onnx":
        kept = (folder / "model.onnx").read_bytes()
        changed(folder, location="../secret.bin")
        (folder / "model.onnx").rename(folder / "other.onnx")
        (folder / "model.onnx").write_bytes(kept)
    config["model"]["decoder"] = decoder
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=message):
        genai_settings(folder)

"""Models from strangers: headers that lie, and configs that ask for more than any model has."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import change_json
from safetensors.torch import save_file
from tiny_models import tiny_model

from rk_export.errors import InputError
from rk_export.runtime.text import TextCodec
from rk_export.source.gguf.header import read_header
from rk_export.source.stored import open_source
from rk_export.source.tensor_files import SafetensorFiles
from rk_export.source.tokenizer_files import copy_tokenizer

MEGABYTE = 1 << 20


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; no model has more"),
        ({"num_hidden_layers": float("inf")}, "num_hidden_layers is inf"),
        ({"num_labels": 10**8}, "num_labels is 100000000"),
        ({"text_config": {"num_hidden_layers": 10**8}}, "num_hidden_layers is 100000000"),
        ({"num_hidden_layers": 5000}, "asks for 5,000 layers, the files hold"),
    ],
)
def test_a_config_that_asks_for_too_much_is_refused_before_it_is_built(
    model: Path, fields: dict[str, Any], message: str
) -> None:
    change_json(model / "config.json", **fields)
    with pytest.raises(InputError, match=message):
        open_source(model)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, '{"x": [' + "{}," * (1 << 22) + "{}]}"]
)
def test_json_without_bounds_is_refused(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    with pytest.raises(InputError, match=r"config\.json: (not valid JSON|nested deeper|too large)"):
        open_source(model)


def _header(stated: int, text: bytes) -> bytes:
    return struct.pack("<Q", stated) + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_header(1 << 62, b"{}"), "states a header of 4,611,686,018,427,387,904 bytes and has 2"),
        (_header(99_000_000, b"{}"), "states a header of 99,000,000 bytes and has 2"),
        (b"\1", "truncated or not safetensors"),
        (b"", "truncated or not safetensors"),
        (_header(20, b'{"a":{"dtype":"F32"}'), "truncated or not safetensors"),
    ],
)
def test_a_header_that_is_longer_than_its_file_is_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        SafetensorFiles([path])


def _stored(path: Path, **entries: Any) -> None:
    text = json.dumps(entries).encode()
    path.write_bytes(_header(len(text), text) + bytes(32))


@pytest.mark.parametrize(
    "entries",
    [
        {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"a": {"dtype": "F32", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 32]}},
        {"a": {"dtype": "F32", "shape": [8], "data_offsets": [32, 0]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},  # bytes that are no tensor's
        {f"{i}": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for i in range(2)},
    ],
    ids=["more than the file", "overflow", "backwards", "a gap", "overlap"],
)
def test_places_that_do_not_fill_the_file_are_refused(tmp_path: Path, entries: dict[str, Any]) -> None:
    path = tmp_path / "model.safetensors"
    _stored(path, **entries)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="truncated or not safetensors"):
            SafetensorFiles([path])
        assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_header_longer_than_any_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as handle:
        handle.write((1 << 26).to_bytes(8, "little"))
        handle.truncate(1 << 27)
    with pytest.raises(InputError, match="its header has 67,108,864 bytes"):
        SafetensorFiles([path])


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3, None, "a\0b"])
def test_an_index_that_names_another_place_is_refused(model: Path, name: object) -> None:
    (model / "model.safetensors").unlink()
    save_file({"a": torch.zeros(2)}, model / "other.safetensors")
    index = {"weight_map": {"a": "other.safetensors", "b": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"outside the folder|no name of a file"):
        open_source(model)


def _gguf(keys: int, tensors: int, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest


def _entry(name: bytes, shape: tuple[int, ...], offset: int) -> bytes:
    sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + sizes + struct.pack("<IQ", 0, offset)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_gguf(1 << 60, 0), "keys and 0 tensors"),
        (_gguf(0, 1 << 40), "0 keys and 1,099,511,627,776 tensors"),
        (_gguf(1, 0, struct.pack("<Q", 1 << 62)), "bytes"),
        (_gguf(1, 0, struct.pack("<Q1sIIQ", 1, b"k", 9, 4, 1 << 61)), "bytes"),
        (_gguf(0, 1, _entry(b"t", (1,) * 5, 0)), "5 dimensions"),
        (_gguf(0, 1, _entry(b"t", (0, 1 << 62), 0)), "is empty"),
        (_gguf(0, 1, _entry(b"t", (1 << 63, 1 << 63), 0)), "ends at byte"),
        (_gguf(0, 2, _entry(b"t", (4,), 0) + _entry(b"u", (4,), 8) + bytes(64)), "t and u overlap"),
    ],
)
def test_a_gguf_header_that_lies_is_refused_before_allocation(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < MEGABYTE
    finally:
        tracemalloc.stop()


def test_a_link_to_a_private_file_is_not_copied_into_a_bundle(tmp_path: Path, model: Path) -> None:
    (tmp_path / "private").write_text("private")
    (model / "merges.txt").symlink_to("../private")
    (tmp_path / "bundle").mkdir()
    with pytest.raises(InputError, match="a link that leads out"):
        copy_tokenizer(model, tmp_path / "bundle")
    assert list((tmp_path / "bundle").iterdir()) == []


def test_a_pipe_is_not_waited_for(model: Path, tmp_path: Path) -> None:
    (model / "generation_config.json").unlink(missing_ok=True)
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="no such file"):
        TextCodec(tmp_path / "tokenizer.json")
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")
    with pytest.raises(InputError, match=r"no config\.json"):
        open_source(model)


def test_a_panic_of_the_tokenizers_library_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pyo3's PanicException is no Exception, so that `except Exception` lets it pass."""

    class PanicException(BaseException):
        pass

    class Broken:
        @staticmethod
        def from_file(path: str) -> None:
            raise PanicException("index out of bounds")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("rk_export.runtime.text.Tokenizer", Broken)
    with pytest.raises(InputError, match=r"not a tokenizer \(index out of bounds\)"):
        TextCodec(tmp_path / "tokenizer.json")

"""What the header of a GGUF file shows is refused before the weights are read."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_files import finish, model_for_gguf, write_gguf

from rk_export.errors import InputError, RkExportError, UnsupportedModelError
from rk_export.source.gguf import file as gguf_file
from rk_export.source.gguf.convert import gguf_to_folder
from rk_export.source.gguf.header import read_header


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail when a file is hashed: a refusal must come before that."""

    def read_whole(path: Path) -> str:
        raise AssertionError(f"{path} was read whole")

    monkeypatch.setattr(gguf_file, "sha256_of", read_whole)


def small(path: Path, architecture: str, extend: Callable[[Any], None] = lambda writer: None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    extend(writer)
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    finish(writer)
    return path


def test_the_reader_agrees_with_the_gguf_package(tiny: Path) -> None:
    header, expected = read_header(tiny), gguf.GGUFReader(tiny)
    fields = {key: field for key, field in expected.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == {key: field.contents() for key, field in fields.items()}
    assert [tensor.name for tensor in header.tensors] == [tensor.name for tensor in expected.tensors]
    for found, tensor in zip(header.tensors, expected.tensors, strict=True):
        np.testing.assert_array_equal(found.values(), tensor.data)


@pytest.mark.usefixtures("no_weights")
class TestRefusedUnread:
    def test_an_unknown_architecture_with_the_known_ones(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match=r"'rwkv6'(?s:.)*gemma3, granite(?s:.)*qwen3moe"):
            gguf_to_folder(small(tmp_path / "rwkv.gguf", "rwkv6"))

    def test_an_image_encoder_and_the_language_model_beside_it(self, tmp_path: Path, tiny: Path) -> None:
        path = small(tmp_path / "mmproj-tiny.gguf", "clip", lambda writer: writer.add_type("mmproj"))
        with pytest.raises(UnsupportedModelError, match=r"no language model(?s:.)*file: tiny\.gguf"):
            gguf_to_folder(path)

    def test_an_adapter(self, tmp_path: Path) -> None:
        path = small(tmp_path / "lora.gguf", "llama", lambda writer: writer.add_type("adapter"))
        with pytest.raises(UnsupportedModelError, match="no language model"):
            gguf_to_folder(path)

    def test_an_encoding_that_cannot_be_dequantized(self, tmp_path: Path) -> None:
        path = write_gguf(
            tmp_path / "tiny.gguf",
            model_for_gguf("llama"),
            without="blk.0.attn_q.weight",
            tensors={"blk.0.attn_q.weight": np.zeros((64, 64), dtype=np.int32)},
        )
        with pytest.raises(UnsupportedModelError, match=r"attn_q\.weight is stored as I32"):
            gguf_to_folder(path)

    def test_an_encoding_of_a_later_time(self, tiny: Path) -> None:
        content = bytearray(tiny.read_bytes())
        name = b"blk.1.ffn_up.weight"
        place = content.index(name) + len(name) + 4 + 2 * 8  # after the count of dimensions and two of them
        content[place : place + 4] = struct.pack("<I", 999)
        tiny.write_bytes(content)
        with pytest.raises(UnsupportedModelError, match=r"ffn_up\.weight is encoded as type 999"):
            gguf_to_folder(tiny)

    def test_a_missing_tensor(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama"), without="blk.1.attn_output.weight")
        with pytest.raises(InputError, match=r"blk\.1\.attn_output\.weight \(model\.layers\.1\.self_attn"):
            gguf_to_folder(path)

    @pytest.mark.parametrize("share", [0.0005, 0.05, 0.5, 0.99])
    def test_a_truncated_file(self, tiny: Path, share: float) -> None:
        content = tiny.read_bytes()
        tiny.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(InputError, match="truncated or damaged"):
            gguf_to_folder(tiny)

    def test_more_tokens_than_rows(self, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama", vocab_size=100))
        with pytest.raises(InputError, match="has 264 tokens, the embedding 100 rows"):
            gguf_to_folder(path)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"PK\x03\x04" + bytes(64), "not a GGUF file"),
            (b"", "not a GGUF file"),
            (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
            (b"<!DOCTYPE html>", "web page"),
            (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
            (b"GGUF" + struct.pack("<I", 1) + bytes(64), "version 1 is not read"),
            (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60) + bytes(64), "truncated or damaged"),
            (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(64), "truncated or damaged"),
            (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "architecture ''"),
        ],
    )
    def test_something_else(self, tmp_path: Path, content: bytes, message: str) -> None:
        path = tmp_path / "other.gguf"
        path.write_bytes(content)
        with pytest.raises(RkExportError, match=message):
            gguf_to_folder(path)

    def test_nothing_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="no such file"):
            gguf_to_folder(tmp_path / "absent.gguf")


@pytest.mark.parametrize(
    "key",
    ["context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"],
)
def test_a_size_that_is_not_stated_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "tiny.gguf"
    content = write_gguf(path, model_for_gguf("llama")).read_bytes()
    name = f"llama.{key}".encode()
    path.write_bytes(content.replace(name, name[:-1] + b"?"))
    with pytest.raises(InputError, match=rf"does not state llama\.{key}"):
        gguf_to_folder(path, tmp_path)


def restate(path: Path, key: str, value: int) -> None:
    """Put another number in place of an unsigned 32-bit one."""
    content = bytearray(path.read_bytes())
    place = content.index(key.encode()) + len(key) + 4
    content[place : place + 4] = struct.pack("<I", value)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama.block_count", 2**32 - 1, "states 4294967295 layers, the tensors are of 2"),
        ("llama.block_count", 0, "states 0 layers"),
        ("llama.block_count", 1, "tensors have no place"),
        ("llama.embedding_length", 2**32 - 1, "shape|makes no llama"),
        ("llama.embedding_length", 0, "shape|makes no llama"),
        ("llama.feed_forward_length", 2**31, r"shape \(128, 64\)"),
        ("llama.attention.head_count", 0, "states no heads"),
        ("llama.attention.head_count", 3, "shape|makes no llama"),
        ("llama.attention.head_count_kv", 0, "states no heads"),
        ("llama.attention.value_length", 8, "values have 8 entries a head and keys 16"),
        ("tokenizer.ggml.eos_token_id", 264, "264 is none of 264 tokens"),
    ],
)
@pytest.mark.usefixtures("no_weights")
def test_a_number_without_sense_is_refused(tiny: Path, key: str, value: int, message: str) -> None:
    restate(tiny, key, value)
    with pytest.raises((InputError, UnsupportedModelError), match=message):
        gguf_to_folder(tiny)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("llama.rope.freq_base", "is 'often', no number"),
        ("llama.rope.scaling.factor", "is 'often', no number"),
        ("llama.expert_count", "is 'often', no number"),
        ("split.count", "split.count is 'often', no number"),
    ],
)
def test_a_word_in_place_of_a_number_is_refused(tmp_path: Path, key: str, message: str) -> None:
    def say_often(writer: Any) -> None:
        writer.kv_data[0].pop(key, None)
        writer.add_string(key, "often")

    path = write_gguf(
        tmp_path / "tiny.gguf",
        model_for_gguf("llama"),
        extend=say_often,
    )
    with pytest.raises(InputError, match=message):
        gguf_to_folder(path)


def test_damaged_headers_end_in_a_message(tiny: Path, tmp_path: Path) -> None:
    content, chance = tiny.read_bytes(), random.Random(0)
    end = min(tensor.begin for tensor in read_header(tiny).tensors)
    refused = 0
    for _ in range(300):
        damaged = bytearray(content)
        damaged[chance.randrange(4, end)] ^= chance.randrange(1, 256)
        tiny.write_bytes(damaged)
        try:
            gguf_file.open_gguf(tiny)
        except RkExportError:
            refused += 1
    assert refused > 50

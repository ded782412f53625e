"""Split GGUF files: any shard stands for all of them, and they must belong together."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from gguf_files import model_for_gguf, write_gguf
from safetensors.torch import load_file

from rk_export.errors import InputError
from rk_export.source.gguf.convert import gguf_to_folder
from rk_export.source.stored import open_source


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "shards"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf", model_for_gguf("llama"), split_max_tensors=8)
    return sorted(folder.glob("tiny-*-of-*.gguf"))


def test_any_shard_stands_for_all(tmp_path: Path, shards: list[Path]) -> None:
    assert len(shards) == 3
    folders = {gguf_to_folder(shard, tmp_path / "cache") for shard in shards}
    (folder,) = folders
    assert folder.name == "tiny"

    whole = gguf_to_folder(write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama")), tmp_path / "cache")
    assert whole != folder
    expected = load_file(whole / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)
    for name in ("config.json", "tokenizer.json"):
        assert (folder / name).read_text() == (whole / name).read_text()


def test_a_folder_of_shards_is_one_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: list[Path]
) -> None:
    monkeypatch.setattr("rk_export.source.gguf.convert.CACHE", tmp_path / "cache")
    shards[0].with_name("mmproj-tiny.gguf").write_bytes(b"GGUF")  # never opened
    assert open_source(shards[0].parent).folder == gguf_to_folder(shards[0])

    write_gguf(shards[0].with_name("other.gguf"), model_for_gguf("llama"))
    with pytest.raises(InputError, match=r"2 GGUF files: other\.gguf, tiny-00001-of-00003\.gguf"):
        open_source(shards[0].parent)


def test_another_content_of_one_shard_is_another_folder(tmp_path: Path, shards: list[Path]) -> None:
    before = gguf_to_folder(shards[0], tmp_path / "cache")
    content = bytearray(shards[2].read_bytes())
    content[-40] ^= 1
    shards[2].write_bytes(content)
    assert gguf_to_folder(shards[0], tmp_path / "cache") != before


def test_missing_shards_are_named(tmp_path: Path, shards: list[Path]) -> None:
    shards[1].unlink()
    with pytest.raises(InputError, match=r"1 of 3 shards are missing: tiny-00002-of-00003\.gguf"):
        gguf_to_folder(shards[2], tmp_path / "cache")
    shards[0].unlink()
    with pytest.raises(InputError, match=r"2 of 3 shards are missing: tiny-00001(?s:.)*tiny-00002"):
        gguf_to_folder(shards[2], tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_shard_under_another_name_is_refused(tmp_path: Path, shards: list[Path]) -> None:
    renamed = shards[1].rename(shards[1].with_name("second.gguf"))
    with pytest.raises(InputError, match=r"one of 3 shards, but its name(?s:.)*-00001-of-00003\.gguf"):
        gguf_to_folder(renamed, tmp_path)


def test_exchanged_shards_are_refused(tmp_path: Path, shards: list[Path]) -> None:
    spare = shards[0].with_name("spare")
    shards[1].rename(spare)
    shards[2].rename(shards[1])
    spare.rename(shards[2])
    with pytest.raises(InputError, match="shard 2 says that it is shard 3"):
        gguf_to_folder(shards[0], tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "not of one model: split.count"),
        ({"tie_word_embeddings": True}, "not of one model: split.tensors.count"),
        ({"intermediate_size": 96}, "shape"),
    ],
)
def test_a_shard_of_another_model_is_refused(
    tmp_path: Path, shards: list[Path], changes: dict[str, int], message: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    write_gguf(other / "tiny.gguf", model_for_gguf("llama", **changes), split_max_tensors=8)
    shutil.copy(sorted(other.glob("*-00002-of-*.gguf"))[0], shards[1])
    with pytest.raises(InputError, match=message):
        gguf_to_folder(shards[0], tmp_path / "cache")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path, shards: list[Path]) -> None:
    other = tmp_path / "other"
    other.mkdir()
    # As many shards and tensors, cut at another place.
    write_gguf(other / "tiny.gguf", model_for_gguf("llama"), split_max_tensors=9)
    shutil.copy(other / shards[1].name, shards[1])
    with pytest.raises(InputError, match=r"lies in tiny-0000\d-of-00003\.gguf too"):
        gguf_to_folder(shards[0], tmp_path / "cache")


def test_a_truncated_shard_is_named(tmp_path: Path, shards: list[Path]) -> None:
    content = shards[1].read_bytes()
    shards[1].write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"tiny-00002-of-00003\.gguf: the GGUF file is truncated"):
        gguf_to_folder(shards[0], tmp_path / "cache")


def test_pieces_of_a_cut_file_are_no_shards(tmp_path: Path) -> None:
    content = write_gguf(tmp_path / "tiny.gguf", model_for_gguf("llama")).read_bytes()
    first, second = tmp_path / "tiny-00001-of-00002.gguf", tmp_path / "tiny-00002-of-00002.gguf"
    first.write_bytes(content[: len(content) // 2])
    second.write_bytes(content[len(content) // 2 :])
    for piece in (first, second):
        with pytest.raises(InputError, match="join the pieces in order first"):
            gguf_to_folder(piece, tmp_path / "cache")

"""Bundles whose files are links into another folder, as the Hub's cache keeps them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Cli
from hub_snapshots import snapshot
from onnx.external_data_helper import set_external_data
from runtime_models import TinyDecoder

from rk_export.options.run import Run
from rk_export.runtime import GenerationOptions, Session
from rk_export.testing import assert_parity


@pytest.mark.parametrize("nested", [False, True], ids=["one folder of blobs", "several"])
@pytest.mark.parametrize("level", [None, 0, 4])
def test_every_way_to_open_follows_the_links(tmp_path: Path, nested: bool, level: int | None) -> None:
    plain = TinyDecoder(quantized_head=True, external=True).write(tmp_path / "bundle")
    linked = snapshot(plain, tmp_path / "cache", nested=nested)
    ids = np.arange(1, 9)[None]
    expected, found = (
        Session.from_pretrained(folder, provider="cpu", accuracy_level=level).prefill_logits(ids)
        for folder in (plain, linked)
    )
    np.testing.assert_array_equal(found, expected)


def test_a_folder_that_is_a_link(tmp_path: Path) -> None:
    TinyDecoder(quantized_head=True, external=True).write(tmp_path / "far" / "bundle")
    (tmp_path / "near").symlink_to(tmp_path / "far" / "bundle", target_is_directory=True)
    session = Session.from_pretrained(tmp_path / "near", provider="cpu", accuracy_level=0)
    assert session.generate([[1, 2]], options=GenerationOptions(max_new_tokens=2))[0].token_ids


def test_links_in_a_folder_beside_a_graph_that_is_none(tmp_path: Path) -> None:
    """Several external files in folders of their own, and only they are links to another place of the bundle."""
    plain = TinyDecoder(quantized_head=True, external=True).write(tmp_path / "bundle")
    ids = np.arange(1, 9)[None]
    levels = (None, 0)
    expected = [
        Session.from_pretrained(plain, provider="cpu", accuracy_level=level).prefill_logits(ids)
        for level in levels
    ]
    model = onnx.load(plain / "model.onnx")
    (plain / "far").mkdir()
    (plain / "weights" / "deep").mkdir(parents=True)
    for index, tensor in enumerate(model.graph.initializer):
        if len(tensor.raw_data) >= 64:
            place = f"weights/{'deep/' if index % 2 else ''}{index}.bin"
            (plain / "far" / f"{index}").write_bytes(tensor.raw_data)
            (plain / place).symlink_to(plain / "far" / f"{index}")
            set_external_data(tensor, place, offset=0, length=len(tensor.raw_data))
            tensor.ClearField("raw_data")
    assert len(list((plain / "weights" / "deep").iterdir())) > 1
    for old in plain.glob("model.onnx*"):
        old.unlink()
    (plain / "model.onnx").write_bytes(model.SerializeToString())
    for level, logits in zip(levels, expected, strict=True):
        session = Session.from_pretrained(plain, provider="cpu", accuracy_level=level)
        np.testing.assert_array_equal(session.prefill_logits(ids), logits)


@pytest.mark.whole
def test_commands_on_a_snapshot(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    linked = snapshot(bundle, tmp_path / "models--someone--some-model")
    assert (linked / "model.onnx.data").is_symlink()
    verified = cli("verify", linked, "--provider", "cpu", "--threads", 1)
    assert verified.code == 0, verified.err
    assert_parity(linked, provider="cpu", run=Run(threads=1))
    assert cli("run", linked, "-p", "The harbour", "--max-new-tokens", 4, "--provider", "cpu").code == 0
    assert cli("explain", linked).code == 0

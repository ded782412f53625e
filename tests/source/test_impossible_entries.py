"""Single entries of config.json that no model can be built with: refused before work, by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import edit_config
from conftest import Cli

DENSE = ("--recipe", "floats", "--set", "calibration.text=none", "--device", "cpu")


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model whose config.json a test may change."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def rotary(kind: str, **more: Any) -> dict[str, Any]:
    """Return rotary parameters with a base of 10,000 unless `more` names another."""
    return {"rope_type": kind, "rope_theta": 10000.0} | more


@pytest.mark.parametrize(
    ("entry", "value", "what"),
    [
        ("num_hidden_layers", "2", "expected int, got str"),
        ("num_attention_heads", 3, "not a multiple of the number of attention heads"),
        ("num_attention_heads", 0, "modulo by zero"),
        ("vocab_size", -5, "vocab_size is -5"),
        ("hidden_size", -64, "hidden_size is -64"),
        ("num_key_value_heads", 0, "num_key_value_heads is 0"),
        ("head_dim", 0, "head_dim is 0"),
        ("max_position_embeddings", 0, "max_position_embeddings is 0"),
        ("max_position_embeddings", 4, "a context of 4 tokens is too short"),
        ("max_position_embeddings", 10**12, "tokens is too long"),
        ("hidden_act", "foo", "'foo' in hidden_act is nothing that it knows"),
        ("pad_token_id", 999, "Padding_idx must be within num_embeddings"),
        ("rope_parameters", rotary("nope"), "'nope' in rope_parameters is nothing that it knows"),
        ("rope_parameters", rotary("default", rope_theta="1"), "builds no llama model from it: TypeError"),
        ("rope_parameters", rotary("linear", factor=0), "logits that are NaN or infinite"),
        ("rope_parameters", rotary("default", rope_theta=0), "logits that are NaN or infinite"),
        ("rms_norm_eps", float("nan"), "logits that are NaN or infinite"),
        ("architectures", 3, "the model is a 3"),
        ("transformers_weights", 3, "transformers_weights is 3"),
    ],
)
def test_an_impossible_entry_is_refused_by_name(
    cli: Cli, model: Path, tmp_path: Path, entry: str, value: Any, what: str
) -> None:
    edit_config(model, **{entry: value})
    # Only running the model tells that its logits are not finite, and a dry run does not run it.
    for extra in ((),) if "logits" in what else (("--dry-run",), ()):
        ended = cli("compress", model, "-o", tmp_path / "out", *DENSE, *extra)
        assert (ended.code, what in ended.err, "\nFix: " in ended.err) == (2, True, True), ended.err
        assert "calibrate:" not in ended.err


def test_a_list_is_no_config(cli: Cli, model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text("[1]")
    ended = cli("analyze", model, "-o", tmp_path / "out")
    assert (ended.code, "holds no JSON object but list" in ended.err) == (2, True)


def test_a_folder_in_place_of_the_weights(cli: Cli, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").mkdir()
    ended = cli("prepare", model, "-o", tmp_path / "out")
    assert (ended.code, "model.safetensors: is" in ended.err) == (2, True), ended.err


def test_a_context_shorter_than_the_probe_names_the_option(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ended = cli("compress", llama, "-o", tmp_path / "out", *DENSE, "--set", "target.context_length=8")
    assert (
        ended.code,
        "--set target.context_length=8: target.context_length: a context of 8" in ended.err,
    ) == (2, True), ended.err


def test_a_name_that_no_file_system_takes(cli: Cli, llama: Path, tmp_path: Path) -> None:
    for words in (("x" * 5000, "-o", tmp_path / "out"), (llama, "-o", tmp_path / ("x" * 300))):
        ended = cli("compress", *words, *DENSE)
        assert (ended.code, "File name too long" in ended.err) == (2, True), ended.err


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/elsewhere.safetensors"])
def test_an_index_that_leads_out_of_the_folder(cli: Cli, model: Path, tmp_path: Path, name: str) -> None:
    (model / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    ended = cli("analyze", model, "-o", tmp_path / "out")
    assert (ended.code, f"names a file outside the folder: {name}" in ended.err) == (2, True), ended.err

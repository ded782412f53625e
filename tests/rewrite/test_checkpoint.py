"""Compressed checkpoints: what is saved comes back, exports alike, and what is damaged is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from compressed import INT4, SourceOf, compress, floats, logits, tokens
from safetensors.torch import load_file, save_file

from rk_export.errors import InputError
from rk_export.graph.build import build_graph
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.checkpoint import is_checkpoint, load_pretrained, save_pretrained
from rk_export.source.stored import StoredModel

FAMILIES = ("llama", "qwen2", "gemma3", "phi3", "gpt2", "mixtral")
RANK_8 = RankRule("rank", 8)
INT8, ASYMMETRIC = QuantSpec(8, 16), QuantSpec(4, 32, symmetric=False)
OPTIONS = {
    "whole": floats(("qk",), rank=RANK_8),
    "per-head": floats(("qk",), qk="per-head", rank=RANK_8, gauge="balanced"),
    "quantized": floats(("qk",), rank=RANK_8, quant=INT4, table=INT8),
    "asymmetric": floats(("qk",), qk="per-head", rank=RANK_8, quant=ASYMMETRIC, table=ASYMMETRIC),
    "half": floats(("qk",), rank=RANK_8, quant=INT4, table=INT8, ep="portable"),
    "dense": floats(),
}
CASES = [(family, form) for family in FAMILIES for form in ("whole", "per-head", "quantized")]
CASES += [("qwen2", form) for form in ("asymmetric", "half", "dense")]


def saved(source: StoredModel, recipe: Recipe, folder: Path) -> Rewritten:
    rewritten = compress(source, recipe)
    save_pretrained(rewritten, folder, tokenizer_from=source.folder)
    return rewritten


@pytest.mark.parametrize(("family", "form"), CASES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_model_has_the_same_logits(
    source_of: SourceOf, tmp_path: Path, family: str, form: str, tied: bool
) -> None:
    source = source_of(family, tie_word_embeddings=tied)
    ids = tokens(source)
    rewritten = saved(source, OPTIONS[form], tmp_path / "out")
    loaded = load_pretrained(tmp_path / "out")
    assert loaded.plan == rewritten.plan
    assert torch.equal(logits(loaded.model, ids), logits(rewritten.model, ids))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    stored = load_file(tmp_path / "out" / "model.safetensors")
    names = set(rewritten.model.state_dict())
    head = f"{source.architecture.lm_head}."
    assert set(stored) == {name for name in names if not (tied and name.startswith(head))}


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["per-head", "quantized"])
def test_a_loaded_model_exports_the_same_initializers(
    source_of: SourceOf, tmp_path: Path, family: str, form: str
) -> None:
    rewritten = saved(source_of(family), OPTIONS[form], tmp_path / "out")
    expected, actual = (
        initializers(build_graph(model)[0]) for model in (rewritten, load_pretrained(tmp_path / "out"))
    )
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array, err_msg=name)


def initializers(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def test_multi_query_attention_per_head(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama", num_key_value_heads=1)
    rewritten = saved(source, OPTIONS["per-head"], tmp_path / "out")
    ids = tokens(source)
    assert torch.equal(logits(load_pretrained(tmp_path / "out").model, ids), logits(rewritten.model, ids))


def test_a_saved_and_loaded_model_can_be_saved_again(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    saved(source, OPTIONS["quantized"], tmp_path / "first")
    save_pretrained(load_pretrained(tmp_path / "first"), tmp_path / "second", tokenizer_from=source.folder)
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_overwritten_without_force(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    rewritten = saved(source, OPTIONS["whole"], tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="already exists"):
        save_pretrained(rewritten, tmp_path / "out", tokenizer_from=source.folder)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    save_pretrained(rewritten, tmp_path / "out", tokenizer_from=source.folder, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoints_are_told_from_plain_models(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    saved(source, OPTIONS["whole"], tmp_path / "out")
    assert is_checkpoint(tmp_path / "out")
    assert not is_checkpoint(source.folder)
    assert not is_checkpoint(tmp_path / "absent")
    with pytest.raises(InputError, match="no rk_export section of version 1"):
        load_pretrained(source.folder)


def edit_section(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    edit(config["rk_export"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "edit",
    [
        lambda section: section.update(version=2),
        lambda section: section.pop("version"),
        lambda section: section.pop("plan"),
        lambda section: section.update(plan=3),
        lambda section: section["plan"].update(rk_export_plan=9),
        lambda section: section["plan"]["sites"].pop(),
        lambda section: section["plan"]["sites"][0].update(rank=9),
        lambda section: section["plan"]["sites"][0].update(paths=["self_attn.q_proj", "nothing"]),
        lambda section: section["plan"].update(table=None),
        lambda section: section["plan"]["table"].update(bits=4),
    ],
)
def test_a_section_that_does_not_fit_is_refused(
    source_of: SourceOf, tmp_path: Path, edit: Callable[[dict[str, Any]], Any]
) -> None:
    saved(source_of("llama"), OPTIONS["quantized"], tmp_path / "out")
    edit_section(tmp_path / "out", edit)
    with pytest.raises(InputError) as caught:
        load_pretrained(tmp_path / "out")
    assert caught.value.where
    assert caught.value.fix


@pytest.mark.parametrize("part", ["qk_factors.down.codes", "embed_tokens.scales", "input_layernorm.weight"])
def test_a_missing_tensor_is_named(source_of: SourceOf, tmp_path: Path, part: str) -> None:
    saved(source_of("llama"), OPTIONS["quantized"], tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(part))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, path)
    with pytest.raises(InputError, match=name):
        load_pretrained(tmp_path / "out")


def test_a_truncated_file_is_refused(source_of: SourceOf, tmp_path: Path) -> None:
    saved(source_of("llama"), OPTIONS["quantized"], tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="truncated"):
        load_pretrained(tmp_path / "out")

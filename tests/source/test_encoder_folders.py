"""Folders of encoders and embedding models as people have them: heads, poolers, joined matrices, modules.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import edit_config, edit_tensors
from classifiers import TOKENS, saved_classifier
from safetensors import safe_open
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.model.description import describe
from rk_export.model.outputs import gives_states
from rk_export.model.torch_logits import torch_logits
from rk_export.source.stored import open_source

IDS = torch.arange(3, 27).reshape(2, 12).numpy()
MODULES = [
    {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
]


def same_states(folder: Path, model: Any) -> None:
    """Compare the states of a folder's model, as it is opened, with those of transformers' model."""
    found = torch_logits(open_source(folder).load())(IDS)
    with torch.no_grad():
        expected = model.eval().base_model(torch.from_numpy(IDS)).last_hidden_state
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "auto", "names"),
    [
        ("bert", AutoModelForPreTraining, "cls.*"),
        ("roberta", AutoModelForMaskedLM, "lm_head.*"),
        ("distilbert", AutoModelForMaskedLM, "vocab_transform.*"),
        ("electra", AutoModelForPreTraining, "discriminator_predictions.*"),
        ("electra", AutoModelForMaskedLM, "generator_predictions.*"),
        ("mpnet", AutoModelForMaskedLM, "lm_head.*"),
        ("modernbert", AutoModelForMaskedLM, "head.*"),
        ("nomic_bert", AutoModelForMaskedLM, "cls.*"),
        ("gte", AutoModelForMaskedLM, "lm_head.*"),
        ("eurobert", AutoModelForMaskedLM, "lm_head.*"),
    ],
)
def test_a_pretraining_head_is_left_out_with_a_notice(
    family: str, auto: Any, names: str, tmp_path: Path
) -> None:
    model = auto.from_config(tiny_config(family))
    model.save_pretrained(tmp_path)
    (notice,) = [text for text in open_source(tmp_path).notices if "pretraining head" in text]
    assert names in notice
    same_states(tmp_path, model)


@pytest.mark.parametrize("family", ["nomic_bert", "gte", "jina_embeddings_v3"])
def test_matrices_that_are_stored_joined_are_cut(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert any("qkv" in name.lower() for name in file.keys())  # noqa: SIM118
    same_states(tmp_path, model)
    path = next(matrix.torch_path for matrix in open_source(tmp_path).description.matrices)
    assert open_source(tmp_path).stored.shapes[f"{path}.weight"] == (64, 64)


def test_joined_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    tiny_model("nomic_bert").save_pretrained(tmp_path)

    def cut(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor[:-1] if "Wqkv" in name else tensor for name, tensor in tensors.items()}

    edit_tensors(tmp_path, cut)
    with pytest.raises(InputError, match="are not 3 equal blocks"):
        open_source(tmp_path)


def test_a_pooler_that_nothing_reads_is_left_out(tmp_path: Path) -> None:
    model = saved_classifier("bert", TOKENS, tmp_path)
    edit_tensors(tmp_path, lambda tensors: {**tensors, "bert.pooler.dense.weight": torch.zeros(64, 64)})
    found = torch_logits(open_source(tmp_path).load())(IDS)
    with torch.no_grad():
        expected = model(torch.from_numpy(IDS)).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "architecture"),
    [
        ("bert", "BertForQuestionAnswering"),
        ("bert", "BertForMultipleChoice"),
        ("embeddinggemma", "Gemma3TextForSequenceClassification"),
    ],
)
def test_other_heads_are_refused_by_name(family: str, architecture: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=[architecture])
    with pytest.raises(InputError, match=f"the model is a {architecture}"):
        open_source(tmp_path)


def test_a_classifier_without_its_layer_is_refused(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path)
    edit_config(tmp_path, architectures=["BertForSequenceClassification"])
    with pytest.raises(InputError, match="classifier"):
        open_source(tmp_path)


def test_modules_make_an_embedding_model_of_a_decoder(tmp_path: Path) -> None:
    """Its checkpoint is that of the language model, with the output projection or without."""
    model = tiny_model("qwen3")
    model.save_pretrained(tmp_path)
    assert not open_source(tmp_path).architecture.is_encoder
    (tmp_path / "modules.json").write_text(json.dumps(MODULES), "utf-8")
    source = open_source(tmp_path)
    assert source.architecture.is_encoder
    assert gives_states(source.config)
    assert source.description.encoder.causal
    same_states(tmp_path, model)


def test_modules_without_pooling_change_nothing(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps(MODULES[:1]), "utf-8")
    assert not open_source(tmp_path).architecture.is_encoder


@pytest.mark.parametrize("text", ["{}", "[1]", "["])
def test_broken_modules_are_refused(text: str, tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    (tmp_path / "modules.json").write_text(text, "utf-8")
    with pytest.raises(InputError, match="repair the file"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("roberta", {"add_cross_attention": True}, "add_cross_attention"),
        ("roberta", {"pad_token_id": None}, "pad_token_id"),
        ("bert", {"hidden_act": "mish"}, "hidden_act"),
        ("mpnet", {"relative_attention_num_buckets": 16}, "relative_attention_num_buckets"),
        ("gte", {"num_attention_heads": 8}, "num_attention_heads"),
        ("bert", {"type_vocab_size": 0}, "type_vocab_size"),
    ],
)
def test_options_that_the_graph_lacks_are_refused(family: str, fields: dict[str, Any], named: str) -> None:
    config = tiny_config(family)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(UnsupportedModelError) as refusal:
        _ = describe(config).encoder
    assert named in f"{refusal.value.what} {refusal.value.where}"


def test_a_classifier_that_config_json_does_not_name_is_told_how_to(tmp_path: Path) -> None:
    saved_classifier("bert", TOKENS, tmp_path)
    edit_config(tmp_path, architectures=None)
    with pytest.raises(InputError, match="classifier") as error:
        open_source(tmp_path)
    assert "in architectures of config.json" in error.value.fix

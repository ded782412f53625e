"""Model types that rk-export does not know: taken as a known family where they compute the same, else refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from acme_models import AcmeConfig
from conftest import trained_tokenizer
from tiny_models import tiny_config, tiny_model
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rk_export import Run, export
from rk_export.errors import UnsupportedModelError
from rk_export.model.families.registry import FAMILIES
from rk_export.model.unknown_families import SAME, TakenAs, decoders, patterns_of, taken_as
from rk_export.parity.oracle import transformers_logits
from rk_export.report.records import Report
from rk_export.source.stored import open_source

IDS = torch.arange(3, 43)[None]
# What a 1B Llama states: of full size, since only its options and kinds of layers matter.
_LARGE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}


def acme(**fields: Any) -> PretrainedConfig:
    return AcmeConfig(**_LARGE, **fields)


def test_a_llama_under_another_name_is_taken_as_one() -> None:
    taken = taken_as(acme(tie_word_embeddings=True, rms_norm_eps=1e-5))
    assert taken.config.model_type == "llama"
    assert taken.config.architectures == ["LlamaForCausalLM"]
    assert taken.error <= SAME
    for field in (*_LARGE, "tie_word_embeddings", "rms_norm_eps"):
        assert getattr(taken.config, field) == getattr(taken.stated, field)


def test_fields_without_effect_are_named() -> None:
    taken = taken_as(acme(flavour="sour", unused_number=9))
    assert taken.idle == ("flavour='sour'", "unused_number=9")
    assert "flavour='sour', unused_number=9" in taken.notice


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"logit_factor": 0.5}, "llama has the same tensors and computes other logits"),
        ({"logit_cap": 30.0}, "llama has the same tensors and computes other logits"),
        # These do nothing to the tiny model's logits, and would to larger ones.
        ({"logit_limit": 900.0}, r"computes what llama does, but may part from it by logit_limit=900\.0"),
        ({"logit_cap": 1e7}, r"may part from it by logit_cap=10000000\.0"),
    ],
)
def test_options_that_act_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as raised:
        taken_as(acme(**fields))
    assert "'acme'" in raised.value.what
    assert raised.value.where == "config.json: model_type"


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 4096}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}),
        ("qwen3", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("granite", {"logits_scaling": 8.0}),
        ("smollm3", {}),
        ("olmo2", {}),
        ("phi3", {}),
        ("starcoder2", {}),
        ("mixtral", {}),
    ],
)
def test_a_known_family_is_never_taken_as_another_that_differs(
    family: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each family is hidden in turn: what it is taken as then must compute the same, or nothing."""
    config = tiny_config({"gemma3_text": "gemma3"}.get(family, family), **fields)
    monkeypatch.delitem(FAMILIES, family)
    if (taken := _taken(config)) is None:
        return
    ours, theirs = (_random(one) for one in (taken.config, config))
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        expected, found = (model(input_ids=IDS).logits for model in (theirs, ours))
    assert float((found - expected).abs().max() / expected.abs().max()) <= SAME


def _taken(config: PretrainedConfig) -> TakenAs | None:
    try:
        return taken_as(config)
    except UnsupportedModelError:
        return None


def _random(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    return model


def test_a_family_with_other_tensors_is_refused_with_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, "gemma2")
    with pytest.raises(UnsupportedModelError, match="'gemma2' is not supported, nor is it a known family"):
        taken_as(tiny_config("gemma2"))
    for model_type, family in list(FAMILIES.items()):
        if family.architecture.layers == "transformer.h":
            monkeypatch.delitem(FAMILIES, model_type)
    with pytest.raises(UnsupportedModelError, match=r"no family has tensors like transformer\.h\.0"):
        taken_as(tiny_config("gpt2"))


def test_names_of_every_family_are_known() -> None:
    """What no family has can only be said where all of them are looked at."""
    assert [model_type for model_type in decoders() if not patterns_of(model_type)] == []


@pytest.fixture
def hidden_mistral(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a tiny Mistral without windows, which rk-export does not know for this test."""
    monkeypatch.delitem(FAMILIES, "mistral")
    tiny_model("mistral", vocab_size=320, sliding_window=None).save_pretrained(tmp_path / "model")
    trained_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_source_is_compared_with_the_class_of_its_own_type(hidden_mistral: Path) -> None:
    source = open_source(hidden_mistral)
    assert source.config.model_type == "llama"
    assert "'mistral'" in source.notices[0]
    assert "'llama'" in source.notices[0]
    reference = transformers_logits(source, IDS)
    assert reference.note == "MistralForCausalLM.from_pretrained"
    with torch.no_grad():
        found = source.load()(input_ids=IDS).logits
    assert float((found - reference.logits).abs().max() / reference.logits.abs().max()) <= SAME


@pytest.mark.whole
def test_bundle_states_the_family_that_runtimes_know(hidden_mistral: Path, tmp_path: Path) -> None:
    export(hidden_mistral, tmp_path / "out", run=Run(threads=1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    report = Report.load(tmp_path / "out" / "report.json")
    assert report.parity[0].note == "MistralForCausalLM.from_pretrained"
    assert any("'mistral' is none of the families" in notice for notice in report.notices)


@pytest.mark.whole
@pytest.mark.parametrize("gain", [1.0, 300.0])
def test_the_models_own_weights_decide(gain: float, tmp_path: Path) -> None:
    """A rule of the class that no config tells and no tiny model meets: the model itself meets it, before any work."""
    fields = tiny_config("llama", vocab_size=320).to_dict()
    fields.pop("model_type")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AcmeConfig(**fields)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(gain / 0.02)  # the scale of fresh weights
    model.save_pretrained(tmp_path / "model")
    trained_tokenizer().save_pretrained(tmp_path / "model")
    if gain == 1.0:
        export(tmp_path / "model", tmp_path / "out", run=Run(threads=1))
        return
    with pytest.raises(UnsupportedModelError, match="'acme' is not supported: with this model's weights"):
        export(tmp_path / "model", tmp_path / "out", run=Run(threads=1))
    assert not (tmp_path / "out").exists()

"""Text models inside models that read images: read as the whole model computes them, and refused where they are not."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_wrappers import WRAPPERS, edit_json, save_as_named_today, tiny_wrapper
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from rk_export.errors import InputError, RkExportError, UnsupportedModelError
from rk_export.model.wrappers import wrapper_of
from rk_export.parity.oracle import transformers_logits
from rk_export.source.stored import StoredModel, open_source
from rk_export.source.wrapped import check_wrapper

IDS = torch.arange(3, 43)[None]
BOUND = 1e-5


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return result


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """Folder of a tiny LLaVA model; each test has its own."""
    folder = tmp_path / "llava"
    tiny_wrapper("llava").save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", WRAPPERS)
def test_text_model_computes_what_the_whole_model_does(name: str, tmp_path: Path) -> None:
    model = tiny_wrapper(name)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    save_as_named_today(model, tmp_path / "named")
    for folder in (tmp_path / "saved", tmp_path / "named"):
        source = open_source(folder)
        assert relative_error(logits(source.load()), expected) <= BOUND
        reference = transformers_logits(source, IDS)
        assert torch.equal(reference.logits, expected)
        assert reference.note == f"{type(model).__name__}.from_pretrained"


@pytest.mark.parametrize("name", WRAPPERS)
def test_config_is_that_of_the_text_model(name: str, tmp_path: Path) -> None:
    model = tiny_wrapper(name)
    model.save_pretrained(tmp_path)
    config = open_source(tmp_path).config
    text = model.config.text_config
    assert config.architectures is not None
    assert config.architectures[0].endswith("ForCausalLM")
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert not {"mrope_section", "mrope_interleaved"} & config.rope_parameters.keys()
    for field in ("hidden_size", "num_hidden_layers", "vocab_size", "eos_token_id"):
        assert getattr(config, field) == getattr(text, field)


def test_reader_is_told_what_is_left_out(llava: Path) -> None:
    tensors = load_file(llava / "model.safetensors")
    others = [tensor for name, tensor in tensors.items() if not name.startswith("language_model.")]
    source = open_source(llava)
    assert f"left out: {len(others)} tensors, " in source.notices[0]
    assert "llava" in source.notices[0]
    assert "llama model" in source.notices[0]
    whole = sum(path.stat().st_size for path in llava.glob("*.safetensors"))
    assert source.stored_bytes() == whole - sum(tensor.nbytes for tensor in others)


def test_folder_without_the_image_part_is_read(llava: Path) -> None:
    change_tensors(
        llava, lambda all: {name: t for name, t in all.items() if name.startswith("language_model.")}
    )
    source = open_source(llava)
    assert "not in the files" in source.notices[0]
    assert relative_error(logits(source.load()), transformers_logits(source, IDS).logits) <= BOUND


@pytest.mark.parametrize("inside", [True, False])
def test_tie_is_what_the_whole_model_says(inside: bool, tmp_path: Path) -> None:
    text = {**WRAPPERS["internvl"]["text_config"], "tie_word_embeddings": inside}
    model = tiny_wrapper("internvl", text_config=text, tie_word_embeddings=not inside)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.description.is_tied is not inside
    assert relative_error(logits(source.load()), logits(model)) <= BOUND


def test_stored_head_counts_more_than_a_tie(tmp_path: Path) -> None:
    model = tiny_wrapper("internvl")
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", tie_word_embeddings=True)
    source = open_source(tmp_path)
    assert not source.description.is_tied
    assert relative_error(logits(source.load()), transformers_logits(source, IDS).logits) <= BOUND


def test_scale_behind_the_head_counts_where_the_whole_model_has_it(tmp_path: Path) -> None:
    text = {
        **WRAPPERS["llava"]["text_config"],
        "model_type": "granite",
        "logits_scaling": 4.0,
        "embedding_multiplier": 3.0,
    }
    model = tiny_wrapper("llava", text_config=text)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert source.config.logits_scaling == 1.0
    assert any("logits_scaling=4.0" in notice for notice in source.notices)
    assert relative_error(logits(source.load()), logits(model)) <= BOUND


def test_experts_inside_a_wrapper(tmp_path: Path) -> None:
    text = {**WRAPPERS["llava"]["text_config"], "model_type": "mixtral", "num_local_experts": 4}
    model = tiny_wrapper("llava", text_config=text)
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    assert relative_error(logits(source.load()), logits(model)) <= BOUND


def _without(part: str) -> Any:
    return lambda all: {name: tensor for name, tensor in all.items() if part not in name}


def _with(name: str) -> Any:
    return lambda all: {**all, name: torch.ones(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("layers.1.mlp.up_proj"), "layers.1.mlp.up_proj.weight' is missing"),
        (_without("lm_head"), "no output projection"),
        (_with("language_model.model.layers.0.mlp.extra.weight"), "no place"),
        (_with("somewhere.else.weight"), "no place"),
        (_with("language_model.model.layers.0.mlp.up_proj.lora_A.weight"), "adapter that is not merged"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: Any, message: str, llava: Path) -> None:
    change_tensors(llava, change)
    with pytest.raises(InputError, match=message):
        open_source(llava)


def test_tensors_of_the_image_part_that_are_unknown_are_left_out(llava: Path) -> None:
    change_tensors(llava, _with("vision_tower.vision_model.post_layernorm.scale"))
    assert "28 tensors" in open_source(llava).notices[0]


def test_every_wrapper_of_transformers_is_read_or_refused() -> None:
    """By its config alone, with the values that it has by default; some classes refuse their own defaults."""
    read = set()
    for model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:
            continue
        wrapper = wrapper_of(config)
        if wrapper is None:
            continue
        with contextlib.suppress(UnsupportedModelError):
            check_wrapper(wrapper, Path("config.json"))
            read.add(model_type)
    assert {name.partition(":")[0] for name in WRAPPERS} - read <= {"paligemma"}


def test_unknown_text_type_is_refused_by_name(tmp_path: Path) -> None:
    text = {**WRAPPERS["llava"]["text_config"], "model_type": "persimmon"}
    tiny_wrapper("llava", text_config=text).save_pretrained(tmp_path)
    with pytest.raises(
        UnsupportedModelError, match="the text model in this llava is a 'persimmon'"
    ) as raised:
        open_source(tmp_path)
    assert raised.value.where == "config.json: text_config.model_type"


def test_prompt_that_is_read_in_both_directions_is_refused(tmp_path: Path) -> None:
    text = {**WRAPPERS["paligemma"]["text_config"]}
    del text["use_bidirectional_attention"]  # the default of PaliGemma: true
    tiny_wrapper("paligemma", text_config=text).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="paligemma reads a prompt in both directions"):
        open_source(tmp_path)


def test_other_head_is_refused(llava: Path) -> None:
    edit_json(llava / "config.json", architectures=["LlavaForSequenceClassification"])
    with pytest.raises(InputError, match="LlavaForSequenceClassification"):
        open_source(llava)


@pytest.mark.parametrize("method", ["mxfp4", "quark"])
def test_quantized_outer_config_is_seen(method: str, llava: Path) -> None:
    edit_json(llava / "config.json", quantization_config={"quant_method": method})
    with pytest.raises(InputError, match=f"quantized by {method}"):
        open_source(llava)


def test_fp8_under_an_outer_config_is_dequantized(llava: Path) -> None:
    def quantize(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for name in [name for name in tensors if name.endswith("mlp.up_proj.weight")]:
            scale = tensors[name].abs().max() / 448
            tensors[name.replace("weight", "weight_scale")] = scale
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        return tensors

    expected = logits(open_source(llava).load())
    change_tensors(llava, quantize)
    edit_json(llava / "config.json", quantization_config={"quant_method": "fp8"})
    source = open_source(llava)
    assert 0 < relative_error(logits(source.load()), expected) < 0.2
    reference = transformers_logits(source, IDS)
    assert reference.note.startswith("LlavaForConditionalGeneration filled by name")
    assert relative_error(logits(source.load()), reference.logits) <= BOUND


def test_flat_config_of_an_older_version_is_read(tmp_path: Path) -> None:
    model = tiny_wrapper("qwen2_vl")
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    text = values.pop("text_config")
    rotation = text.pop("rope_parameters")
    text |= {
        "rope_theta": rotation["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    }
    (tmp_path / "config.json").write_text(json.dumps({**text, **values}))
    source = open_source(tmp_path)
    assert relative_error(logits(source.load()), logits(model)) <= BOUND


def test_source_travels_between_processes(llava: Path) -> None:
    source = open_source(llava)
    remake, arguments = source.__reduce__()
    again = remake(*arguments)  # type: ignore[operator]
    assert isinstance(again, StoredModel)
    assert again.structure() == source.structure()


def test_broken_text_config_is_refused(llava: Path) -> None:
    values = json.loads((llava / "config.json").read_text())
    values["text_config"]["num_attention_heads"] = 0
    (llava / "config.json").write_text(json.dumps(values))
    with pytest.raises(RkExportError):
        open_source(llava)


def test_value_that_the_plain_family_does_not_take_is_refused(tmp_path: Path) -> None:
    tiny_wrapper("qwen2_5_vl").save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    values["text_config"]["max_window_layers"] = None
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="max_window_layers") as raised:
        open_source(tmp_path)
    assert raised.value.where == "config.json: text_config"

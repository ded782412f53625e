"""LoRA adapters that were trained on a model that reads images: what they change of the text model is merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import change_json
from peft_adapters import ATTENTION, peft
from safetensors.torch import load_file, save_file
from tiny_wrappers import tiny_wrapper
from transformers import AutoModelForMultimodalLM

from rk_export.errors import InputError
from rk_export.parity.oracle import transformers_logits
from rk_export.source.stored import open_source

pytestmark = pytest.mark.slow

IDS = torch.arange(3, 43)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=IDS).logits
    return result


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def loaded(folder: Path) -> Any:
    return AutoModelForMultimodalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def trained(name: str, folder: Path, **fields: Any) -> Any:
    """Save a tiny wrapper and an adapter of it whose every trainable value is random; return peft's model."""
    tiny_wrapper(name).save_pretrained(folder / "base")
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **fields})
    model = peft.get_peft_model(loaded(folder / "base"), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "adapter")
    return peft.PeftModel.from_pretrained(loaded(folder / "base"), folder / "adapter").eval()


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "image part too": ("llava", {}),
    "attention and MLP": ("qwen2_5_vl", {"target_modules": [*ATTENTION, "gate_proj", "up_proj"]}),
    "patterns": (
        "smolvlm",
        {
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {r"model\.text_model\.layers\.0\.self_attn\.q_proj": 3},
        },
    ),
    "one of two tied matrices": ("gemma3", {"target_modules": ["embed_tokens", "q_proj"]}),
    "trained norm": ("mistral3", {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_peft(kind: str, tmp_path: Path) -> None:
    name, fields = KINDS[kind]
    expected = logits(trained(name, tmp_path, **fields))
    source = open_source(tmp_path / "adapter")
    assert relative_error(logits(source.load()), expected) <= 1e-5
    assert relative_error(expected, logits(loaded(tmp_path / "base"))) > 1e-2, "the adapter does nothing"
    reference = transformers_logits(source, IDS)
    assert "filled by name" in reference.note
    assert relative_error(reference.logits, expected) <= 1e-5


def test_reader_is_told_of_changes_that_are_left_out(tmp_path: Path) -> None:
    trained("llava", tmp_path)
    source = open_source(tmp_path / "adapter")
    assert any("also changes 2 modules that do not read text" in notice for notice in source.notices)


def test_adapter_of_the_text_model_itself(tmp_path: Path) -> None:
    expected = logits(trained("llava", tmp_path, target_modules=r".*language_model.*q_proj"))
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name.replace("model.language_model", "model"): t for name, t in tensors.items()}, path)
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}
    change_json(tmp_path / "adapter" / "adapter_config.json", auto_mapping=mapping)
    assert relative_error(logits(open_source(tmp_path / "adapter").load()), expected) <= 1e-5


def test_adapter_of_another_wrapper_is_refused(tmp_path: Path) -> None:
    trained("llava", tmp_path)
    mapping = {
        "base_model_class": "Qwen2VLForConditionalGeneration",
        "parent_library": "transformers.models.qwen2_vl",
    }
    change_json(tmp_path / "adapter" / "adapter_config.json", auto_mapping=mapping)
    with pytest.raises(InputError, match="Qwen2VLForConditionalGeneration"):
        open_source(tmp_path / "adapter")


def test_adapter_of_the_image_part_alone_is_refused(tmp_path: Path) -> None:
    trained("llava", tmp_path, target_modules=r".*vision_tower.*q_proj")
    with pytest.raises(InputError, match="changes nothing of the text model"):
        open_source(tmp_path / "adapter")

"""Tiny random models that read images around a language model, with weights that make a dropped term visible."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForMultimodalLM, PreTrainedModel
from transformers.initialization import no_init_weights

_TEXT: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER}
_CLIP = {"model_type": "clip_vision_model", **_TOWER, "projection_dim": 16}
_PIXTRAL = {"model_type": "pixtral", **_TOWER}
_QWEN_TOWER = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 5, "num_hidden_layers": 4}


def _text(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_TEXT, **fields}


# By name: fields of the wrapper's config. The name up to a colon is its model type.
WRAPPERS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": _text(
            "gemma3_text", **_GEMMA, layer_types=["sliding_attention", "full_attention"] * 2
        ),
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 150,
        "boi_token_index": 151,
        "eoi_token_index": 152,
    },
    "mistral3": {
        "text_config": _text("mistral", head_dim=32, sliding_window=5),
        "vision_config": _PIXTRAL,
        "image_token_index": 150,
        "spatial_merge_size": 1,
        "tie_word_embeddings": False,
    },
    "mistral3:ministral3": {
        "text_config": _text(
            "ministral3",
            head_dim=32,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.3,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        ),
        "vision_config": _PIXTRAL,
        "image_token_index": 150,
        "spatial_merge_size": 1,
        "tie_word_embeddings": False,
    },
    "llava": {"text_config": _text("llama"), "vision_config": _CLIP, "image_token_index": 150},
    "llava_next": {"text_config": _text("mistral"), "vision_config": _CLIP, "image_token_index": 150},
    "vipllava": {
        "text_config": _text("llama"),
        "vision_config": _CLIP,
        "image_token_index": 150,
        "vision_feature_layers": [-1, -1],
    },
    "paligemma": {
        "text_config": _text(
            "gemma2",
            **_GEMMA,
            attn_logit_softcapping=5.0,
            final_logit_softcapping=8.0,
            use_bidirectional_attention=False,
        ),
        "vision_config": {**_SIGLIP, "projection_dim": 64},
        "projection_dim": 64,
        "image_token_index": 150,
    },
    "paligemma:gemma": {
        "text_config": _text("gemma", head_dim=32, use_bidirectional_attention=False),
        "vision_config": {**_SIGLIP, "projection_dim": 64},
        "projection_dim": 64,
        "image_token_index": 150,
    },
    "aya_vision": {
        "text_config": _text(
            "cohere2",
            logit_scale=0.25,
            sliding_window=5,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "vision_config": _SIGLIP,
        "image_token_index": 150,
        "downsample_factor": 2,
        "tie_word_embeddings": True,
    },
    "internvl": {
        "text_config": _text("qwen2"),
        "vision_config": {
            "model_type": "internvl_vision",
            **_TOWER,
            "image_size": [16, 16],
            "patch_size": [8, 8],
        },
        "image_token_id": 150,
        "tie_word_embeddings": False,
    },
    "internvl:qwen3": {
        "text_config": _text("qwen3", head_dim=32),
        "vision_config": {
            "model_type": "internvl_vision",
            **_TOWER,
            "image_size": [16, 16],
            "patch_size": [8, 8],
        },
        "image_token_id": 150,
        "tie_word_embeddings": True,
    },
    "qwen2_vl": {
        "text_config": _text("qwen2_vl_text", rope_parameters=_MROPE),
        "vision_config": {**_QWEN_TOWER, "embed_dim": 16, "hidden_size": 64, "mlp_ratio": 1},
        "image_token_id": 150,
        "video_token_id": 151,
        "vision_start_token_id": 152,
        "vision_end_token_id": 153,
    },
    "qwen2_5_vl": {
        "text_config": _text(
            "qwen2_5_vl_text",
            rope_parameters=_MROPE,
            use_sliding_window=True,
            sliding_window=5,
            max_window_layers=1,
        ),
        "vision_config": {
            **_QWEN_TOWER,
            "hidden_size": 16,
            "intermediate_size": 16,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
        "image_token_id": 150,
        "video_token_id": 151,
        "vision_start_token_id": 152,
        "vision_end_token_id": 153,
        "tie_word_embeddings": False,
    },
    "qwen3_vl": {
        "text_config": _text(
            "qwen3_vl_text",
            head_dim=32,
            rope_parameters={**_MROPE, "mrope_section": [4, 6, 6], "mrope_interleaved": True},
        ),
        "vision_config": {
            **_QWEN_TOWER,
            "hidden_size": 16,
            "intermediate_size": 16,
            "out_hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        "image_token_id": 150,
        "video_token_id": 151,
        "vision_start_token_id": 152,
        "vision_end_token_id": 153,
        "tie_word_embeddings": True,
    },
    "smolvlm": {
        "text_config": _text("llama"),
        "vision_config": {"model_type": "smolvlm_vision", **_TOWER},
        "image_token_id": 150,
        "scale_factor": 1,
    },
    "idefics3": {
        "text_config": _text("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
        "vision_config": {"model_type": "idefics3_vision", **_TOWER},
        "image_token_id": 150,
        "scale_factor": 1,
    },
}


def tiny_wrapper(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random wrapper: fp32, evaluation mode, eager attention, every parameter random.

    Args:
        name: One of ``WRAPPERS``.
        seed: Of the weights.
        **overrides: Fields of the wrapper's config.
    """
    config = AutoConfig.for_model(name.partition(":")[0], **(WRAPPERS[name] | overrides))
    with no_init_weights():
        model = AutoModelForMultimodalLM.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and path.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + 0.25 * noise)
    model.tie_weights()
    return model


def save_as_named_today(model: PreTrainedModel, folder: Path) -> None:
    """Save a model with its tensors named as its modules are; `save_pretrained` takes the older names of some."""
    model.save_pretrained(folder)
    tensors = dict(model.state_dict())
    for twin in model.all_tied_weights_keys:
        tensors.pop(twin, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_json(path: Path, **entries: Any) -> None:
    """Change entries at the top of a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(values | entries), encoding="utf-8")

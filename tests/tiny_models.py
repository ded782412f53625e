"""Tiny random Hugging Face models of every family, with weights that make a dropped term visible."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

FAMILIES: tuple[str, ...] = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "olmo2",
    "granite",
    "smollm3",
    "starcoder2",
    "gpt2",
    "opt",
    "mixtral",
    "qwen3_moe",
    "bert",
)
DECODERS: tuple[str, ...] = FAMILIES[:-1]

_SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 5, "num_hidden_layers": 4}
_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"head_dim": 16, "sliding_window": 5},
    "qwen3": {"head_dim": 32},
    "gemma2": {**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
    "gemma3": {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.6,
        "logits_scaling": 2.5,
    },
    "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
    "mixtral": _MOE,
    "qwen3_moe": {**_MOE, "head_dim": 32, "moe_intermediate_size": 48, "norm_topk_prob": True},
    "bert": {"type_vocab_size": 2},
}
_RENAMED = {
    "gpt2": {
        "intermediate_size": "n_inner",
        "num_key_value_heads": None,
        "max_position_embeddings": "n_positions",
    },
    "opt": {"intermediate_size": "ffn_dim", "num_key_value_heads": None},
    "bert": {"num_key_value_heads": None},
}
_MODEL_TYPE = {"gemma3": "gemma3_text"}


def tiny_config(family: str, **overrides: Any) -> PretrainedConfig:
    """Return the config of a tiny model: hidden 64, 4 heads, vocabulary 160, 128 positions.

    Args:
        family: One of ``FAMILIES``.
        **overrides: Fields of the family's config.
    """
    renamed = _RENAMED.get(family, {})
    fields = {renamed.get(name, name): value for name, value in _SIZES.items()}
    fields.pop(None, None)
    if family == "opt":
        fields["word_embed_proj_dim"] = fields["hidden_size"]
    fields |= _FAMILY.get(family, {}) | overrides
    return AutoConfig.for_model(_MODEL_TYPE.get(family, family), **fields)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random model: fp32, evaluation mode, eager attention.

    Every parameter is random, biases and norm gains too, so that a dropped one is noticed.

    Args:
        family: One of ``FAMILIES``.
        seed: Of the weights.
        **overrides: Fields of the family's config.
    """
    config = tiny_config(family, **overrides)
    auto = AutoModel if family == "bert" else AutoModelForCausalLM
    model = auto.from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + 0.25 * noise)
    return model


def massive(llama: Path, folder: Path) -> Path:
    """Save the tiny model with one row of the first down_proj 1,000 times larger: a massive activation."""
    shutil.copytree(llama, folder)
    model = tiny_model("llama", vocab_size=320)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[5] *= 1000
    model.save_pretrained(folder)
    return folder


def transformers_own(folder: Path, **config: Any) -> PreTrainedModel:
    """Return a folder's model as transformers loads it: float32, eager attention, evaluation mode."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **config
    )
    return model.eval()

"""Llama-like families whose MLP has no gate: squared ReLU (Arcee, Jais 2) and xIELU (Apertus)."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture, RolePaths
from rk_export.model.config_fields import activation_of, llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family

_MLP: RolePaths = (("up", "mlp.up_proj"), ("down", "mlp.down_proj"))


def _arcee(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, gated_mlp=False)


def _jais2(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, gated_mlp=False, norm="layer", norm_epsilon=number(config, "layer_norm_eps"))


def _apertus(config: PretrainedConfig) -> DecoderSpec:
    # In other families transformers would give xIELU numbers of another type than the model's.
    activation = "xielu" if config.hidden_act == "xielu" else activation_of(config)
    return llama_spec(config, gated_mlp=False, activation=activation, query_key_norm="head")


_APERTUS_NAMES = Architecture(
    "apertus",
    mlp=_MLP,
    renamed={
        "attention_layernorm": "input_layernorm",
        "feedforward_layernorm": "post_attention_layernorm",
    },
)
FAMILIES = (
    Family(Architecture("arcee", mlp=_MLP), _arcee),
    Family(Architecture("jais2", mlp=_MLP), _jais2),
    Family(_APERTUS_NAMES, _apertus),
)

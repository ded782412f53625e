"""GPT-BigCode (SantaCoder, StarCoder): GPT-2 with one key and value for all heads, or joined head by head."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

from torch import nn
from transformers import PretrainedConfig

from rk_export.model.architecture import HeadLayout
from rk_export.model.canonical import split_linear
from rk_export.model.config_fields import layer_specs, llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family, Refused
from rk_export.model.families.gpt2 import GPT2_NAMES


def _gpt_bigcode(config: PretrainedConfig) -> DecoderSpec:
    heads = _heads(config)
    scale = heads.head_dim**-0.5 if config.scale_attn_weights else 1.0
    return llama_spec(
        config,
        heads=heads,
        layers=layer_specs(config, scale=scale, rotary=lambda config, index: None),
        intermediate_size=int(config.n_inner if config.n_inner is not None else 4 * config.hidden_size),
        gated_mlp=False,
        norm="layer",
        norm_epsilon=number(config, "layer_norm_epsilon"),
        learned_positions=int(config.max_position_embeddings),
    )


def _heads(config: PretrainedConfig) -> HeadLayout:
    heads = int(config.num_attention_heads)
    return HeadLayout(heads, 1 if config.multi_query else heads, int(config.hidden_size) // heads)


def _split(layer: nn.Module) -> None:
    attention = layer.get_submodule("attn")
    joined = attention.c_attn
    if isinstance(joined, nn.Linear):
        rows, kv_rows = cast(int, attention.embed_dim), cast(int, attention.kv_dim)
        parts = {"q_proj": rows, "k_proj": kv_rows, "v_proj": kv_rows}
        attention.c_attn = split_linear(joined, parts, groups=cast(int, attention.kv_heads))


_NAMES = replace(GPT2_NAMES, model_type="gpt_bigcode", rewrite=_split)
_REFUSED = (Refused("add_cross_attention", False, "the exported decoder has no cross attention"),)
FAMILIES = (Family(_NAMES, _gpt_bigcode, _REFUSED, heads=_heads),)

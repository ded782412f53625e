"""MPT: no positions but ALiBi, LayerNorm without shift, no biases."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture
from rk_export.model.canonical import split_linear
from rk_export.model.config_fields import layer_specs, llama_spec, number, plain_heads
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.alibi import skipped_slopes
from rk_export.model.families.base import Family, Refused

# transformers' class computes with these values, whatever the config says.
_ALIBI_BIAS_MAX, _EXPANSION = 8, 4


def _mpt(config: PretrainedConfig) -> DecoderSpec:
    heads, attention = plain_heads(config), config.attn_config
    scale = attention.softmax_scale
    if scale == 0:
        raise UnsupportedModelError(
            "softmax_scale=0: GroupQueryAttention takes a scale of 0 for its usual one",
            where="config.json: attn_config.softmax_scale",
        )
    return llama_spec(
        config,
        layers=layer_specs(config, scale=scale, rotary=lambda config, index: None),
        intermediate_size=_EXPANSION * int(config.hidden_size),
        activation="gelu",
        gated_mlp=False,
        norm="layer_no_bias",
        norm_epsilon=number(config, "layer_norm_epsilon"),
        clip=float(attention.clip_qkv or 0.0),
        alibi_slopes=skipped_slopes(heads.heads, _ALIBI_BIAS_MAX),
    )


def _split(layer: nn.Module) -> None:
    attention = layer.get_submodule("attn")
    joined = attention.Wqkv
    if isinstance(joined, nn.Linear):
        third = joined.out_features // 3
        attention.Wqkv = split_linear(joined, {"q_proj": third, "k_proj": third, "v_proj": third})


_NAMES = Architecture(
    "mpt",
    layers="transformer.blocks",
    embedding="transformer.wte",
    attention=(
        ("q", "attn.Wqkv.q_proj"),
        ("k", "attn.Wqkv.k_proj"),
        ("v", "attn.Wqkv.v_proj"),
        ("o", "attn.out_proj"),
    ),
    mlp=(("up", "ffn.up_proj"), ("down", "ffn.down_proj")),
    renamed={
        "norm_1": "input_layernorm",
        "norm_2": "post_attention_layernorm",
        "attn.Wqkv": "self_attn",
        "attn.out_proj": "self_attn.o_proj",
        "ffn": "mlp",
    },
    outer={"transformer.norm_f": "model.norm"},
    width_field="",
    context_field="max_seq_len",
    tuple_layers=True,
    rewrite=_split,
)
_OF_ITS_OWN = "transformers' class does not read it, so it computes another model than was trained"
_REFUSED = (
    Refused("attn_config.alibi", True, _OF_ITS_OWN),
    Refused("attn_config.alibi_bias_max", _ALIBI_BIAS_MAX, _OF_ITS_OWN),
    Refused("attn_config.attn_type", "multihead_attention", _OF_ITS_OWN),
    Refused("attn_config.prefix_lm", False, _OF_ITS_OWN),
    Refused("attn_config.qk_ln", False, _OF_ITS_OWN),
    Refused("expansion_ratio", _EXPANSION, _OF_ITS_OWN),
    Refused("logit_scale", False, _OF_ITS_OWN),
    Refused("no_bias", True, _OF_ITS_OWN),
)
FAMILIES = (Family(_NAMES, _mpt, _REFUSED),)

"""GPT-NeoX, Pythia, Dolly: queries, keys and values joined head by head, attention and MLP side by side or not."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.canonical import split_linear
from rk_export.model.config_fields import llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family


def _gpt_neox(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        gated_mlp=False,
        parallel=bool(config.use_parallel_residual),
        norm="layer",
        norm_epsilon=number(config, "layer_norm_eps"),
    )


def _split(layer: nn.Module) -> None:
    attention = layer.get_submodule("attention")
    joined = attention.query_key_value
    if isinstance(joined, nn.Linear):
        third = joined.out_features // 3
        parts = {"q_proj": third, "k_proj": third, "v_proj": third}
        heads = third // cast(int, attention.head_size)
        attention.query_key_value = split_linear(joined, parts, groups=heads)


_NAMES = Architecture(
    "gpt_neox",
    layers="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    attention=(
        ("q", "attention.query_key_value.q_proj"),
        ("k", "attention.query_key_value.k_proj"),
        ("v", "attention.query_key_value.v_proj"),
        ("o", "attention.dense"),
    ),
    mlp=(("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")),
    renamed={
        "attention.query_key_value": "self_attn",
        "attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    outer={"gpt_neox.final_layer_norm": "model.norm"},
    rotary="gpt_neox.rotary_emb",
    rewrite=_split,
)
FAMILIES = (Family(_NAMES, _gpt_neox),)

"""BLOOM: no positions but ALiBi, a norm behind the embedding, matrices joined head by head."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.canonical import split_linear
from rk_export.model.config_fields import layer_specs, llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.alibi import halved_slopes
from rk_export.model.families.base import Family, Refused


def _bloom(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, rotary=lambda config, index: None),
        intermediate_size=4 * int(config.hidden_size),
        activation="gelu_pytorch_tanh",
        gated_mlp=False,
        norm="layer",
        norm_epsilon=number(config, "layer_norm_epsilon"),
        embedding_norm=True,
        alibi_skips_holes=True,
        alibi_slopes=halved_slopes(int(config.num_attention_heads)),
    )


def _split(layer: nn.Module) -> None:
    attention = layer.get_submodule("self_attention")
    joined = attention.query_key_value
    if isinstance(joined, nn.Linear):
        third = joined.out_features // 3
        parts = {"q_proj": third, "k_proj": third, "v_proj": third}
        attention.query_key_value = split_linear(joined, parts, groups=cast(int, attention.num_heads))


_NAMES = Architecture(
    "bloom",
    layers="transformer.h",
    embedding="transformer.word_embeddings",
    attention=(
        ("q", "self_attention.query_key_value.q_proj"),
        ("k", "self_attention.query_key_value.k_proj"),
        ("v", "self_attention.query_key_value.v_proj"),
        ("o", "self_attention.dense"),
    ),
    mlp=(("up", "mlp.dense_h_to_4h"), ("down", "mlp.dense_4h_to_h")),
    renamed={
        "self_attention.query_key_value": "self_attn",
        "self_attention.dense": "self_attn.o_proj",
        "mlp.dense_h_to_4h": "mlp.up_proj",
        "mlp.dense_4h_to_h": "mlp.down_proj",
    },
    outer={
        "transformer.word_embeddings_layernorm": "model.embed_norm",
        "transformer.ln_f": "model.norm",
    },
    width_field="",
    context_field="seq_length",
    tuple_layers=True,
    rewrite=_split,
)
_REFUSED = (
    Refused(
        "apply_residual_connection_post_layernorm",
        False,
        "the exported decoder adds a block's output to what its norm reads",
    ),
    Refused(
        "slow_but_exact",
        False,
        "with more than one rank of training, PyTorch then leaves out biases; it computes the same without",
    ),
)
FAMILIES = (Family(_NAMES, _bloom, _REFUSED),)

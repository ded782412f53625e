"""Falcon: three ways to join queries, keys and values, and three places for its norms."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture, HeadLayout
from rk_export.model.canonical import split_linear
from rk_export.model.config_fields import llama_spec, number
from rk_export.model.decoder_spec import PRE_NORM, SHARED_NORM, DecoderSpec, NormNames
from rk_export.model.families.base import Family, Refused

_TWO_NORMS = NormNames("ln_attn", None, "ln_mlp", None)


def _falcon(config: PretrainedConfig) -> DecoderSpec:
    parallel = bool(config.parallel_attn)
    return llama_spec(
        config,
        heads=_heads(config),
        intermediate_size=int(config.ffn_hidden_size),
        gated_mlp=False,
        parallel=parallel,
        norm="layer",
        norm_names=_norm_names(config) if parallel else PRE_NORM,
        norm_epsilon=number(config, "layer_norm_epsilon"),
    )


def _norm_names(config: PretrainedConfig) -> NormNames:
    """Return the norms of a parallel block.

    Raises:
        UnsupportedModelError: PyTorch's class has other norms than it reads, and fails.
    """
    count, is_new = config.num_ln_in_parallel_attn, bool(config.new_decoder_architecture)
    if is_new and count in (2, None):
        return _TWO_NORMS
    if count == 2 or (is_new and count != 1):
        raise _refusal("num_ln_in_parallel_attn", count, "PyTorch's class reads norms that it does not have")
    return SHARED_NORM


def _heads(config: PretrainedConfig) -> HeadLayout:
    heads, kv_heads = int(config.num_attention_heads), int(config.num_kv_heads)
    if kv_heads < 1:
        raise _refusal("num_kv_heads", kv_heads, "queries need keys")
    if config.new_decoder_architecture:
        if not config.parallel_attn:
            raise _refusal("parallel_attn", config.parallel_attn, "the new decoder architecture ignores it")
    elif config.multi_query:
        kv_heads = 1
    elif kv_heads != heads:
        raise _refusal("num_kv_heads", kv_heads, "the joined matrix holds one key and value for each head")
    return HeadLayout(heads, kv_heads, int(config.hidden_size) // heads)


def _refusal(field: str, value: object, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{field}={value!r}: {reason}", where="config.json", fix="correct the value, or use another model"
    )


def _split(layer: nn.Module) -> None:
    attention = layer.get_submodule("self_attention")
    joined = attention.query_key_value
    if isinstance(joined, nn.Linear):
        width, groups = cast(int, attention.head_dim), cast(int, attention.num_kv_heads)
        rows = {"q_proj": cast(int, attention.num_heads) * width}
        rows |= dict.fromkeys(("k_proj", "v_proj"), groups * width)
        attention.query_key_value = split_linear(joined, rows, groups=groups)


_NAMES = Architecture(
    "falcon",
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
    outer={"transformer.ln_f": "model.norm"},
    rotary="transformer.rotary_emb",
    width_field="ffn_hidden_size",
    tuple_layers=True,
    rewrite=_split,
)
_REFUSED = (
    Refused(
        "alibi",
        False,
        "PyTorch rounds the position of a key to 8 bits (bfloat16), and eager attention adds the bias twice",
    ),
)
FAMILIES = (Family(_NAMES, _falcon, _REFUSED, heads=_heads),)

"""Phi-3: query, key and value joined in one matrix, gate and up in another."""

from __future__ import annotations

from typing import cast

from torch import nn
from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.canonical import split_gate_up, split_linear
from rk_export.model.config_fields import every_window, layer_specs, llama_spec
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family


def _phi3(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, layers=layer_specs(config, window=every_window))


def _split_phi3(layer: nn.Module) -> None:
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    if isinstance(attention.qkv_proj, nn.Linear):
        rows = attention.qkv_proj.out_features
        kv_rows = cast(int, attention.num_key_value_heads) * cast(int, attention.head_dim)
        parts = {"q_proj": rows - 2 * kv_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        attention.qkv_proj = split_linear(attention.qkv_proj, parts)
    if isinstance(mlp.gate_up_proj, nn.Linear):
        mlp.gate_up_proj = split_gate_up(mlp.gate_up_proj)


_NAMES = Architecture(
    "phi3",
    attention=(
        ("q", "self_attn.qkv_proj.q_proj"),
        ("k", "self_attn.qkv_proj.k_proj"),
        ("v", "self_attn.qkv_proj.v_proj"),
        ("o", "self_attn.o_proj"),
    ),
    mlp=(
        ("gate", "mlp.gate_up_proj.gate_proj"),
        ("up", "mlp.gate_up_proj.up_proj"),
        ("down", "mlp.down_proj"),
    ),
    renamed={"self_attn.qkv_proj": "self_attn", "mlp.gate_up_proj": "mlp"},
    rewrite=_split_phi3,
)
FAMILIES = (Family(_NAMES, _phi3),)

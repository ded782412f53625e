"""GPT-J and CodeGen: attention and MLP side by side behind one norm, and a rotation of neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import nn
from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture
from rk_export.model.canonical import split_linear
from rk_export.model.config_fields import layer_specs, llama_spec, number
from rk_export.model.decoder_spec import SHARED_NORM, DecoderSpec
from rk_export.model.families.base import Family
from rk_export.model.rotary import ALL_LAYERS, RotaryPart, RotaryTable

_BASE = 10_000  # of the frequencies; a constant of the classes


def _spec(config: PretrainedConfig) -> DecoderSpec:
    if not config.rotary_dim:
        raise UnsupportedModelError(
            f"rotary_dim={config.rotary_dim!r}: PyTorch's rotation would be as wide as all heads together",
            where="config.json",
            fix="use a model that states how many coordinates of a head are rotated",
        )
    if config.rotary_dim % 2:
        raise UnsupportedModelError(
            f"rotary_dim={config.rotary_dim}: coordinates are rotated in pairs",
            where="config.json: rotary_dim",
        )
    return llama_spec(
        config,
        layers=layer_specs(config, rotary=lambda config, index: ALL_LAYERS),
        intermediate_size=int(config.n_inner if config.n_inner is not None else 4 * config.hidden_size),
        gated_mlp=False,
        parallel=True,
        norm="layer",
        norm_names=SHARED_NORM,
        norm_epsilon=number(config, "layer_norm_epsilon"),
        rotary_interleaved=True,
    )


def _tables(config: PretrainedConfig, positions: int) -> dict[str, RotaryTable]:
    """Return the one table; the classes have sines and cosines themselves instead of a module of frequencies."""
    width = int(config.rotary_dim)
    frequencies = 1.0 / (_BASE ** (torch.arange(0, width, 2, dtype=torch.int64) / width))
    return {ALL_LAYERS: RotaryTable((RotaryPart(frequencies.numpy(), positions),), 1.0)}


def _split(layer: nn.Module) -> None:
    """Cut CodeGen's joined matrix: blocks of rows, in each a part of the queries, the values and the keys."""
    attention = layer.get_submodule("attn")
    joined = attention.qkv_proj
    if isinstance(joined, nn.Linear):
        third = joined.out_features // 3
        parts = {"q_proj": third, "v_proj": third, "k_proj": third}
        attention.qkv_proj = split_linear(joined, parts, groups=cast(int, attention.mp_num))


_GPTJ = Architecture(
    "gptj",
    layers="transformer.h",
    embedding="transformer.wte",
    attention=(
        ("q", "attn.q_proj"),
        ("k", "attn.k_proj"),
        ("v", "attn.v_proj"),
        ("o", "attn.out_proj"),
    ),
    mlp=(("up", "mlp.fc_in"), ("down", "mlp.fc_out")),
    renamed={
        "ln_1": "input_layernorm",
        "attn.qkv_proj": "self_attn",
        "attn.out_proj": "self_attn.o_proj",
        "attn": "self_attn",
        "mlp.fc_in": "mlp.up_proj",
        "mlp.fc_out": "mlp.down_proj",
    },
    outer={"transformer.ln_f": "model.norm"},
    width_field="n_inner",
)
_CODEGEN = replace(
    _GPTJ,
    model_type="codegen",
    attention=(
        ("q", "attn.qkv_proj.q_proj"),
        ("k", "attn.qkv_proj.k_proj"),
        ("v", "attn.qkv_proj.v_proj"),
        ("o", "attn.out_proj"),
    ),
    rewrite=_split,
)
FAMILIES = (Family(_GPTJ, _spec, tables=_tables), Family(_CODEGEN, _spec, tables=_tables))

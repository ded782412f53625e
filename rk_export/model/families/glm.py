"""GLM: gate and up joined in one matrix, neighbours rotated together in a part of each head; GLM 4 has four norms."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.canonical import split_gate_up
from rk_export.model.config_fields import llama_spec
from rk_export.model.decoder_spec import DecoderSpec, NormNames
from rk_export.model.families.base import Family

_FOUR_NORMS = NormNames(
    "input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"
)


def _glm(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, rotary_interleaved=True)


def _glm4(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, rotary_interleaved=True, norm_names=_FOUR_NORMS)


def _split(layer: nn.Module) -> None:
    mlp = layer.get_submodule("mlp")
    if isinstance(mlp.gate_up_proj, nn.Linear):
        mlp.gate_up_proj = split_gate_up(mlp.gate_up_proj)


_JOINED: dict[str, Any] = {
    "mlp": (
        ("gate", "mlp.gate_up_proj.gate_proj"),
        ("up", "mlp.gate_up_proj.up_proj"),
        ("down", "mlp.down_proj"),
    ),
    "renamed": {"mlp.gate_up_proj": "mlp"},
    "rewrite": _split,
}
FAMILIES = (
    Family(Architecture("glm", **_JOINED), _glm),
    Family(Architecture("glm4", **_JOINED), _glm4),
)

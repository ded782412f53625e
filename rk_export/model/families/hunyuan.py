"""HunYuan dense: queries and keys are normalized after they were rotated."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import llama_spec
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family


def _hunyuan(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, query_key_norm="head", norm_after_rotation=True)


_NAMES = Architecture(
    "hunyuan_v1_dense",
    renamed={
        "self_attn.query_layernorm": "self_attn.q_norm",
        "self_attn.key_layernorm": "self_attn.k_norm",
    },
)
FAMILIES = (Family(_NAMES, _hunyuan),)

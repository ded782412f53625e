"""Phi 1, 1.5 and 2: attention and MLP side by side behind one LayerNorm, biases everywhere, the head's included."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import ATTENTION, Architecture
from rk_export.model.config_fields import llama_spec, number
from rk_export.model.decoder_spec import SHARED_NORM, DecoderSpec
from rk_export.model.families.base import Family


def _phi(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        gated_mlp=False,
        parallel=True,
        norm="layer",
        norm_names=SHARED_NORM,
        norm_epsilon=number(config, "layer_norm_eps"),
        query_key_norm="head" if config.qk_layernorm else None,
    )


_NAMES = Architecture(
    "phi",
    attention=(*ATTENTION[:3], ("o", "self_attn.dense")),
    mlp=(("up", "mlp.fc1"), ("down", "mlp.fc2")),
    renamed={
        "self_attn.dense": "self_attn.o_proj",
        "self_attn.q_layernorm": "self_attn.q_norm",
        "self_attn.k_layernorm": "self_attn.k_norm",
        "mlp.fc1": "mlp.up_proj",
        "mlp.fc2": "mlp.down_proj",
    },
    outer={"model.final_layernorm": "model.norm"},
)
FAMILIES = (Family(_NAMES, _phi),)

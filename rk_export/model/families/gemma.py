"""Gemma: norms that store their gain minus one, a scaled embedding, norms around each block, soft caps."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import layer_specs, llama_spec, window_by_type
from rk_export.model.decoder_spec import SANDWICH_NORM, DecoderSpec
from rk_export.model.families.base import Family, Refused

_CAUSAL = (Refused("use_bidirectional_attention", False, "the exported attention is causal"),)


def _gemma2(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, scale=config.query_pre_attn_scalar**-0.5, window=window_by_type),
        norm_names=SANDWICH_NORM,
        attention_softcap=float(config.attn_logit_softcapping or 0.0),
        embedding_scale=float(config.hidden_size**0.5),
        logit_softcap=float(config.final_logit_softcapping or 0.0),
    )


def _gemma3(config: PretrainedConfig) -> DecoderSpec:
    # The config has a soft cap of attention too, but attention does not use it.
    return llama_spec(
        config,
        layers=layer_specs(config, scale=config.query_pre_attn_scalar**-0.5, window=window_by_type),
        norm_names=SANDWICH_NORM,
        query_key_norm="head",
        embedding_scale=float(config.hidden_size**0.5),
        logit_softcap=float(config.final_logit_softcapping or 0.0),
    )


FAMILIES = (
    Family(Architecture("gemma2", unit_offset=True), _gemma2, _CAUSAL),
    Family(Architecture("gemma3_text", unit_offset=True), _gemma3, _CAUSAL),
)

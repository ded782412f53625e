"""Families with the names of Llama and few differences: windows, biases, norms of queries and keys, multipliers."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import (
    every_window,
    layer_specs,
    llama_spec,
    rotary_table,
    window_by_type,
)
from rk_export.model.decoder_spec import POST_NORM, DecoderSpec
from rk_export.model.families.base import Family


def _mistral(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, layers=layer_specs(config, window=every_window))


def _qwen2(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, layers=layer_specs(config, window=window_by_type))


def _qwen3(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, layers=layer_specs(config, window=window_by_type), query_key_norm="head")


def _olmo2(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, norm_names=POST_NORM, query_key_norm="all")


def _granite(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, scale=config.attention_multiplier),
        embedding_scale=float(config.embedding_multiplier),
        residual_scale=float(config.residual_multiplier),
        logit_scale=1.0 / config.logits_scaling,
    )


def _smollm3(config: PretrainedConfig) -> DecoderSpec:
    def rotary(config: PretrainedConfig, index: int) -> str | None:
        return rotary_table(config, index) if config.no_rope_layers[index] else None

    return llama_spec(config, layers=layer_specs(config, window=window_by_type, rotary=rotary))


FAMILIES = (
    Family(Architecture("llama"), llama_spec),
    Family(Architecture("mistral"), _mistral),
    Family(Architecture("qwen2"), _qwen2),
    Family(Architecture("qwen3"), _qwen3),
    Family(Architecture("olmo2"), _olmo2),
    Family(Architecture("granite"), _granite),
    Family(Architecture("smollm3"), _smollm3),
)

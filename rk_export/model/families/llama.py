"""Families with the names of Llama and few differences: windows, biases, norms of queries and keys, multipliers."""

from __future__ import annotations

from dataclasses import replace

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


def _windows_by_layer(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, layers=layer_specs(config, window=window_by_type))


def _qwen3(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, layers=layer_specs(config, window=window_by_type), query_key_norm="head")


def _olmo2(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, norm_names=POST_NORM, query_key_norm="all")


def _olmo3(config: PretrainedConfig) -> DecoderSpec:
    return replace(_olmo2(config), layers=layer_specs(config, window=window_by_type))


def _interleaved(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, rotary_interleaved=True)


def _smollm3(config: PretrainedConfig) -> DecoderSpec:
    def rotary(config: PretrainedConfig, index: int) -> str | None:
        return rotary_table(config, index) if config.no_rope_layers[index] else None

    return llama_spec(config, layers=layer_specs(config, window=window_by_type, rotary=rotary))


FAMILIES = (
    # transformers builds InternLM3 and IQuest-Coder as Llama itself.
    *(Family(Architecture(name), llama_spec) for name in ("llama", "internlm3", "iquestcoder", "seed_oss")),
    *(Family(Architecture(name), _windows_by_layer) for name in ("qwen2", "ministral", "cwm")),
    *(Family(Architecture(name), _interleaved) for name in ("ernie4_5", "helium")),
    Family(Architecture("mistral"), _mistral),
    Family(Architecture("qwen3"), _qwen3),
    Family(Architecture("olmo2"), _olmo2),
    Family(Architecture("olmo3"), _olmo3),
    Family(Architecture("smollm3"), _smollm3),
)

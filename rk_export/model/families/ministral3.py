"""Ministral 3: a Mistral whose queries grow with their position."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import every_window, layer_specs, llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec, QueryGrowth
from rk_export.model.families.base import Family


def _ministral3(config: PretrainedConfig) -> DecoderSpec:
    growth = QueryGrowth(
        number(config, "rope_parameters.llama_4_scaling_beta"),
        int(number(config, "rope_parameters.original_max_position_embeddings")),
    )
    return llama_spec(
        config,
        layers=layer_specs(config, window=every_window),
        query_growth=growth if growth.beta else None,
    )


FAMILIES = (Family(Architecture("ministral3"), _ministral3),)

"""LG's EXAONE: 3 is a Llama whose tensors are stored under other names, 4 has norms behind its blocks."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import layer_specs, llama_spec, rotary_table, window_by_type
from rk_export.model.decoder_spec import POST_NORM, DecoderSpec
from rk_export.model.families.base import Family


def _exaone4(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, window=window_by_type, rotary=_rotary),
        norm_names=POST_NORM,
        query_key_norm="head",
    )


def _rotary(config: PretrainedConfig, index: int) -> str | None:
    """Among layers with a window, those that see all keys rotate nothing."""
    rotates = config.sliding_window is None or config.layer_types[index] == "sliding_attention"
    return rotary_table(config, index) if rotates else None


FAMILIES = (
    # transformers builds EXAONE 3 as a Llama, and renames its tensors when it reads them.
    Family(Architecture("exaone"), llama_spec),
    Family(Architecture("exaone4"), _exaone4),
)

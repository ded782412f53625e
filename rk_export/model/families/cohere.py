"""Command R and R7B, Aya: attention and MLP side by side behind one LayerNorm without shift, scaled logits."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import layer_specs, llama_spec, number, rotary_table, window_by_type
from rk_export.model.decoder_spec import SHARED_NORM, DecoderSpec, LayerSpec
from rk_export.model.families.base import Family


def _cohere(config: PretrainedConfig) -> DecoderSpec:
    return _spec(config, layer_specs(config), has_query_key_norm=config.use_qk_norm)


def _cohere2(config: PretrainedConfig) -> DecoderSpec:
    def rotary(config: PretrainedConfig, index: int) -> str | None:
        """Only layers with a window rotate."""
        return None if window_by_type(config, index) is None else rotary_table(config, index)

    return _spec(config, layer_specs(config, window=window_by_type, rotary=rotary), has_query_key_norm=False)


def _spec(
    config: PretrainedConfig, layers: tuple[LayerSpec, ...], *, has_query_key_norm: bool
) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layers,
        parallel=True,
        norm="layer_no_bias",
        norm_names=SHARED_NORM,
        norm_epsilon=number(config, "layer_norm_eps"),
        query_key_norm="each head" if has_query_key_norm else None,
        rotary_interleaved=True,
        logit_scale=number(config, "logit_scale"),
    )


FAMILIES = (
    Family(Architecture("cohere"), _cohere),
    Family(Architecture("cohere2"), _cohere2),
)

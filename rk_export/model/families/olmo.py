"""OLMo 1: LayerNorm without weights, and queries, keys and values that may be clipped."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import llama_spec
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family

NORM_EPSILON = 1e-5  # a constant of the class: the config has no field for it


def clip_of(config: PretrainedConfig) -> float:
    """Return the bound of queries, keys and values; 0 where nothing is clipped.

    Raises:
        UnsupportedModelError: The bound is not above 0.
    """
    if config.clip_qkv is not None and config.clip_qkv <= 0:
        raise UnsupportedModelError(
            f"clip_qkv={config.clip_qkv!r}: a clip that is not above 0 leaves nothing",
            where="config.json: clip_qkv",
            fix="state null where nothing is clipped",
        )
    return float(config.clip_qkv or 0.0)


def _olmo(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, norm="layer_plain", norm_epsilon=NORM_EPSILON, clip=clip_of(config))


FAMILIES = (Family(Architecture("olmo"), _olmo),)

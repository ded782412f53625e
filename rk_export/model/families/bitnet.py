"""BitNet b1.58: squared ReLU with a gate, and norms inside attention and MLP."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import llama_spec
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family


def _bitnet(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, sub_norms=True)


FAMILIES = (Family(Architecture("bitnet"), _bitnet),)

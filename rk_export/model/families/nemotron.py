"""Nemotron and Minitron: LayerNorm that stores its gain minus one, squared ReLU without a gate."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family


def _nemotron(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, gated_mlp=False, norm="layer", norm_epsilon=number(config, "norm_eps"))


_NAMES = Architecture("nemotron", mlp=(("up", "mlp.up_proj"), ("down", "mlp.down_proj")), unit_offset=True)
FAMILIES = (Family(_NAMES, _nemotron),)

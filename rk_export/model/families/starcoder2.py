"""StarCoder 2: LayerNorm, an MLP without a gate, biases, one window for all layers."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import every_window, layer_specs, llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family


def _starcoder2(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, window=every_window),
        gated_mlp=False,
        norm="layer",
        norm_epsilon=number(config, "norm_epsilon"),
    )


_NAMES = Architecture(
    "starcoder2",
    mlp=(("up", "mlp.c_fc"), ("down", "mlp.c_proj")),
    renamed={"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
)
FAMILIES = (Family(_NAMES, _starcoder2),)

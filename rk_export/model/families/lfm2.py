"""LFM2 and LFM2.5: gated short convolutions beside a few layers with attention."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import ATTENTION, Architecture, RolePaths
from rk_export.model.config_fields import layer_specs, llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family

_CONV, _ATTENTION = "conv", "full_attention"
_SHORT_CONV: RolePaths = (("conv_in", "conv.in_proj"), ("conv_out", "conv.out_proj"))


def _other_mixer(config: PretrainedConfig, index: int) -> RolePaths | None:
    return _SHORT_CONV if config.layer_types[index] == _CONV else None


def _spec(config: PretrainedConfig) -> DecoderSpec:
    _check_kinds(config)
    if config.conv_L_cache < 1:
        raise UnsupportedModelError(
            f"conv_L_cache is {config.conv_L_cache}: a convolution reads one token at least",
            where="config.json: conv_L_cache",
        )
    layers = tuple(
        replace(layer, mixer="short_conv") if kind == _CONV else layer
        for layer, kind in zip(layer_specs(config), config.layer_types, strict=True)
    )
    return llama_spec(
        config,
        layers=layers,
        intermediate_size=_width(config),
        activation="silu",
        norm_epsilon=number(config, "norm_eps"),
        query_key_norm="head",
        conv_taps=int(config.conv_L_cache),
    )


def _check_kinds(config: PretrainedConfig) -> None:
    """Refuse what the graph has no layer for.

    Raises:
        UnsupportedModelError: Names the field.
    """
    kinds = list(config.layer_types)
    unknown = sorted(set(kinds) - {_CONV, _ATTENTION})
    if unknown:
        what = f"layers of the kind {unknown[0]!r}: only {_CONV!r} and {_ATTENTION!r} are exported"
    elif len(kinds) != config.num_hidden_layers:
        what = f"{len(kinds)} kinds for {config.num_hidden_layers} layers"
    elif _ATTENTION not in kinds:
        what = "no layer has attention: the length of a text is read from its keys"
    else:
        return
    raise UnsupportedModelError(what, where="config.json: layer_types", fix="use a model with other layers")


def _width(config: PretrainedConfig) -> int:
    """Return the width of the MLP, which the model computes from the one that is stated.

    Raises:
        UnsupportedModelError: It is 0.
    """
    width = int(config.intermediate_size)
    if not config.block_auto_adjust_ff_dim:
        return width
    width = int(2 * width / 3)
    if config.block_ffn_dim_multiplier is None:
        return width
    step = int(config.block_multiple_of)
    adjusted = -(-int(config.block_ffn_dim_multiplier * width) // step) * step
    if adjusted < 1:
        raise UnsupportedModelError(
            f"block_ffn_dim_multiplier={config.block_ffn_dim_multiplier} and intermediate_size="
            f"{config.intermediate_size} leave the MLP no width",
            where="config.json: block_ffn_dim_multiplier",
        )
    return adjusted


FAMILIES = (
    Family(
        Architecture(
            "lfm2",
            attention=(*ATTENTION[:3], ("o", "self_attn.out_proj")),
            other_mixers=_other_mixer,
            mlp=(("gate", "feed_forward.w1"), ("up", "feed_forward.w3"), ("down", "feed_forward.w2")),
            renamed={
                "self_attn.out_proj": "self_attn.o_proj",
                "self_attn.q_layernorm": "self_attn.q_norm",
                "self_attn.k_layernorm": "self_attn.k_norm",
                "feed_forward.w1": "mlp.gate_proj",
                "feed_forward.w3": "mlp.up_proj",
                "feed_forward.w2": "mlp.down_proj",
                "operator_norm": "input_layernorm",
                "ffn_norm": "post_attention_layernorm",
            },
            outer={"model.embedding_norm": "model.norm"},
            width_switches=("block_auto_adjust_ff_dim",),
        ),
        _spec,
    ),
)

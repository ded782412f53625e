"""Families with multipliers on the embedding, attention, the residual stream and the logits: Granite, HyperCLOVA X."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.model.architecture import Architecture
from rk_export.model.canonical import split_gate_up
from rk_export.model.config_fields import layer_specs, llama_spec, number, rotary_table
from rk_export.model.decoder_spec import PRE_NORM, DecoderSpec, NormNames
from rk_export.model.families.base import Family, Refused, RefusedLayers

_PERI_NORM = NormNames("input_layernorm", "post_norm1", "post_attention_layernorm", "post_norm2")


def attention_scale(config: PretrainedConfig) -> float:
    """Return the factor on the dot products of queries and keys.

    Raises:
        InputError: It is no number.
        UnsupportedModelError: It is 0.
    """
    scale = number(config, "attention_multiplier")
    if scale == 0:
        raise UnsupportedModelError(
            "attention_multiplier=0: GroupQueryAttention takes a scale of 0 for its usual one",
            where="config.json: attention_multiplier",
        )
    return scale


def scaled_spec(config: PretrainedConfig, **changes: Any) -> DecoderSpec:
    """Return the spec of a Llama with multipliers, all but that of the logits.

    Args:
        config: Of the model.
        **changes: Fields of `DecoderSpec`.

    Raises:
        InputError: A multiplier is no number.
        UnsupportedModelError: The config asks for what the graph does not have.
    """
    read: dict[str, Any] = {
        "embedding_scale": number(config, "embedding_multiplier"),
        "residual_scale": number(config, "residual_multiplier"),
    }
    if "layers" not in changes:
        read["layers"] = layer_specs(config, scale=attention_scale(config))
    return llama_spec(config, **(read | changes))


def divided_logits(config: PretrainedConfig) -> float:
    """Return the factor on the logits of a model that divides them.

    Raises:
        InputError: The divisor is no number, or 0.
    """
    divisor = number(config, "logits_scaling")
    if divisor == 0:
        raise InputError(
            "logits_scaling is 0, and the logits are divided by it",
            where="config.json",
            fix="give the number that the weights were made with",
        )
    return 1.0 / divisor


def _granite(config: PretrainedConfig) -> DecoderSpec:
    return scaled_spec(config, logit_scale=divided_logits(config))


def _granite_hybrid(config: PretrainedConfig) -> DecoderSpec:
    def rotary(config: PretrainedConfig, index: int) -> str | None:
        return rotary_table(config, index) if config.position_embedding_type == "rope" else None

    return scaled_spec(
        config,
        layers=layer_specs(config, scale=attention_scale(config), rotary=rotary),
        intermediate_size=int(config.shared_intermediate_size),
        logit_scale=divided_logits(config),
    )


def _hyperclovax(config: PretrainedConfig) -> DecoderSpec:
    return scaled_spec(
        config,
        norm_names=_PERI_NORM if config.use_post_norm else PRE_NORM,
        logit_scale=number(config, "logits_scaling"),
    )


def _split_shared(layer: nn.Module) -> None:
    mlp = layer.get_submodule("shared_mlp")
    if isinstance(mlp.input_linear, nn.Linear):
        mlp.input_linear = split_gate_up(mlp.input_linear)


_HYBRID_NAMES = Architecture(
    "granitemoehybrid",
    mlp=(
        ("gate", "shared_mlp.input_linear.gate_proj"),
        ("up", "shared_mlp.input_linear.up_proj"),
        ("down", "shared_mlp.output_linear"),
    ),
    renamed={"shared_mlp.input_linear": "mlp", "shared_mlp.output_linear": "mlp.down_proj"},
    width_field="shared_intermediate_size",
    rewrite=_split_shared,
)
_HYBRID_REFUSED = (
    RefusedLayers(("full_attention",), "only layers with attention are exported, no Mamba layers"),
    Refused("num_local_experts", 0, "its experts beside the shared MLP are not exported"),
)
FAMILIES = (
    Family(Architecture("granite"), _granite),
    Family(_HYBRID_NAMES, _granite_hybrid, _HYBRID_REFUSED),
    Family(Architecture("hyperclovax"), _hyperclovax),
)

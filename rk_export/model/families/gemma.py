"""Gemma: norms that store their gain minus one, a scaled embedding, norms around each block, soft caps."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import activation_of, layer_specs, llama_spec, number, window_by_type
from rk_export.model.decoder_spec import SANDWICH_NORM, DecoderSpec, NormNames
from rk_export.model.families.base import Family, Refused

_CAUSAL = (Refused("use_bidirectional_attention", False, "the exported attention is causal"),)
_VAULT_NORM = NormNames("input_layernorm", None, "pre_feedforward_layernorm", None)


def _gemma(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(config, embedding_scale=float(config.hidden_size**0.5))


def _gemma2(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, scale=_attention_scale(config), window=window_by_type),
        activation=activation_of(config, ("hidden_activation",)),
        norm_names=SANDWICH_NORM,
        attention_softcap=_softcap(config, "attn_logit_softcapping"),
        embedding_scale=float(config.hidden_size**0.5),
        logit_softcap=_softcap(config, "final_logit_softcapping"),
    )


def _vaultgemma(config: PretrainedConfig) -> DecoderSpec:
    return replace(_gemma2(config), norm_names=_VAULT_NORM)


def _gemma3(config: PretrainedConfig) -> DecoderSpec:
    # The config has a soft cap of attention too, but attention does not use it.
    return llama_spec(
        config,
        layers=layer_specs(config, scale=_attention_scale(config), window=window_by_type),
        activation=activation_of(config, ("hidden_activation",)),
        norm_names=SANDWICH_NORM,
        query_key_norm="head",
        embedding_scale=float(config.hidden_size**0.5),
        logit_softcap=_softcap(config, "final_logit_softcapping"),
    )


def _attention_scale(config: PretrainedConfig) -> float:
    scalar = number(config, "query_pre_attn_scalar")
    if scalar <= 0:
        raise InputError(
            f"query_pre_attn_scalar is {scalar:g}, and attention is divided by its root",
            where="config.json",
            fix="give the number that the weights were made with",
        )
    return float(scalar**-0.5)


def _softcap(config: PretrainedConfig, field: str) -> float:
    """Return a soft cap, 0 for none. PyTorch takes a cap of 0 for one, and divides by it."""
    stated = getattr(config, field)
    if stated == 0:
        raise UnsupportedModelError(
            f"{field}=0: a softcap of 0 leaves nothing",
            where=f"config.json: {field}",
            fix="state null for none",
        )
    return float(stated or 0.0)


FAMILIES = (
    Family(Architecture("gemma", unit_offset=True), _gemma, _CAUSAL),
    Family(Architecture("gemma2", unit_offset=True), _gemma2, _CAUSAL),
    Family(Architecture("vaultgemma", unit_offset=True), _vaultgemma),
    Family(Architecture("gemma3_text", unit_offset=True), _gemma3, both_ways="use_bidirectional_attention"),
)

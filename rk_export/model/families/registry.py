"""All families that are exported, by the ``model_type`` of their configs."""

from __future__ import annotations

from dataclasses import replace

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture, HeadLayout
from rk_export.model.decoder_as_encoder import as_encoder
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.encoder_spec import EncoderSpec
from rk_export.model.families import (
    bert,
    bitnet,
    bloom,
    cohere,
    exaone,
    falcon,
    gemma,
    glm,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gptj,
    granite,
    hunyuan,
    lfm2,
    llama,
    ministral3,
    mixtures,
    modernbert,
    mpt,
    nemotron,
    olmo,
    opt,
    phi,
    phi3,
    rotary_encoders,
    stablelm,
    starcoder2,
    ungated,
)
from rk_export.model.families.base import Family
from rk_export.model.outputs import head_of
from rk_export.model.rotary import ROTATED_MULTIPLE

_KINS = (
    *(
        llama,
        granite,
        exaone,
        gemma,
        glm,
        ungated,
        phi,
        phi3,
        ministral3,
        cohere,
        olmo,
        nemotron,
        hunyuan,
        bitnet,
        lfm2,
    ),
    *(mixtures, starcoder2, gpt2, opt),
    *(gpt_neo, gpt_bigcode, gpt_neox, stablelm, gptj, falcon, bloom, mpt),
    *(bert, modernbert, rotary_encoders),
)
# Widths of heads that GroupQueryAttention takes are multiples of it.
HEAD_MULTIPLE = 8
FAMILIES: dict[str, Family] = {family.model_type: family for kin in _KINS for family in kin.FAMILIES}


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a config.

    Raises:
        UnsupportedModelError: The family is unknown; the message lists the known ones.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedModelError(
            f"the model type {config.model_type!r} is not supported",
            where="config.json: model_type",
            fix=f"use one of {', '.join(sorted(FAMILIES))}",
        )
    return family


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the names of a config's family, in the class that the model is built as.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    return family_of(config).names(config)


def heads_of(config: PretrainedConfig) -> HeadLayout:
    """Return the attention heads of a model, the same in every layer.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    return family_of(config).heads(config)


def decoder_spec(config: PretrainedConfig) -> DecoderSpec:
    """Read the spec of a decoder.

    Raises:
        UnsupportedModelError: The family is unknown, or the config turns on an option that the exported graph does not
            have.
    """
    family = family_of(config)
    if family.decoder is None:
        raise TypeError(f"{family.model_type} is an encoder")
    family.check(config)
    _check_heads(family.heads(config), config)
    spec = family.decoder(config)
    _check_widths(spec, family.architecture.width_field)
    return spec


def encoder_spec(config: PretrainedConfig) -> EncoderSpec:
    """Read the spec of an encoder, or of a decoder that gives its hidden states.

    Raises:
        UnsupportedModelError: The family is unknown, or the config turns on an option that the exported graph does not
            have.
    """
    family = family_of(config)
    family.check(config)
    if family.encoder is not None:
        spec = family.encoder(config)
        if (found := family.classifier(config)) is not None:
            by_token = head_of(config) == "tokens"
            spec = replace(spec, classifier=found.spec(int(config.num_labels), by_token=by_token))
    elif family.decoder is not None:
        spec = as_encoder(family.decoder(config), causal=not family.sees_both_ways(config))
    else:
        raise TypeError(f"{family.model_type} computes nothing")
    _check_heads(spec.heads, config, ROTATED_MULTIPLE if spec.is_rotated else HEAD_MULTIPLE)
    _check_sizes(spec, family.architecture.width_field)
    return spec


def _check_heads(heads: HeadLayout, config: PretrainedConfig, multiple: int = HEAD_MULTIPLE) -> None:
    """Refuse heads that GroupQueryAttention does not take; it says so when it runs."""
    is_empty = min(heads.heads, heads.kv_heads, heads.head_dim) < 1
    if is_empty or heads.heads % heads.kv_heads or heads.head_dim % multiple:
        width = "head_dim, hidden_size" if getattr(config, "head_dim", None) else "hidden_size"
        raise UnsupportedModelError(
            f"{heads.heads} heads of width {heads.head_dim} on {heads.kv_heads} key/value heads: "
            f"GroupQueryAttention takes whole groups of heads and widths that are multiples of {multiple}",
            where=f"config.json: num_attention_heads, num_key_value_heads, {width}",
        )


def _check_sizes(spec: EncoderSpec, width_field: str) -> None:
    """Refuse an MLP without neurons, and an embedding without columns."""
    for field, number in {width_field: spec.intermediate_size, "embedding_size": spec.embedding_size}.items():
        if number < 1:
            raise UnsupportedModelError(
                f"{field} is {number}; the exported graph needs at least 1", where=f"config.json: {field}"
            )


def _check_widths(spec: DecoderSpec, width_field: str) -> None:
    """Refuse an MLP or a mixture without neurons or experts: transformers builds one that adds nothing."""
    numbers = {width_field: spec.intermediate_size}
    if spec.experts is not None:
        numbers["num_local_experts"] = spec.experts.count
        numbers["num_experts_per_tok"] = spec.experts.per_token
    for field, number in numbers.items():
        if number < 1:
            raise UnsupportedModelError(
                f"{field} is {number}; the exported graph needs at least 1", where=f"config.json: {field}"
            )

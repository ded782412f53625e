"""All families that are exported, by the ``model_type`` of their configs."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture, HeadLayout
from rk_export.model.decoder_spec import DecoderSpec
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
    gpt_neox,
    gptj,
    granite,
    hunyuan,
    lfm2,
    llama,
    ministral3,
    mixtures,
    mpt,
    nemotron,
    olmo,
    opt,
    phi,
    phi3,
    stablelm,
    starcoder2,
    ungated,
)
from rk_export.model.families.base import Family

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
    *(gpt_neox, stablelm, gptj, falcon, bloom, mpt),
    bert,
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
    """Return the names of a config's family.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    return family_of(config).architecture


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


def _check_heads(heads: HeadLayout, config: PretrainedConfig) -> None:
    """Refuse heads that GroupQueryAttention does not take; it says so when it runs."""
    if heads.heads % heads.kv_heads or heads.head_dim % HEAD_MULTIPLE:
        width = "head_dim" if getattr(config, "head_dim", None) else "hidden_size"
        raise UnsupportedModelError(
            f"{heads.heads} heads of width {heads.head_dim} on {heads.kv_heads} key/value heads: "
            f"GroupQueryAttention takes whole groups of heads and widths that are multiples of {HEAD_MULTIPLE}",
            where=f"config.json: num_attention_heads, num_key_value_heads, {width}",
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

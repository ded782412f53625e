"""Models that read images or sound around a language model: the config of the text model inside one.

A bundle reads text alone, so of such a wrapper the text model is exported, as the wrapper computes it for text.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from rk_export.errors import InputError
from rk_export.model.families.registry import FAMILIES

# Text types without a class of their own for text: with equal positions in all three rows their rotation is the plain
# one, and the rest is this family.
_PLAIN_TYPES = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
_OF_THREE_ROWS = ("mrope_section", "mrope_interleaved")
# What the classes for text do to the logits behind the head, with the value that does nothing. The wrappers have a head
# of their own, which does none of it but what is named here.
_BEHIND_HEAD: dict[str, float | None] = {
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
    "final_logit_softcapping": None,
}
_APPLIED = {"paligemma": ("final_logit_softcapping",)}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_OF_THE_FILES = ("quantization_config", "transformers_weights")


@dataclass(frozen=True)
class Wrapper:
    """A model that reads more than text.

    Args:
        config: Its own.
        text: Of the text model in it, as the class for text takes it.
        notices: What the text model's own config would not lead one to expect.
    """

    config: PretrainedConfig
    text: PretrainedConfig
    notices: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """The wrapper's family."""
        return str(self.config.model_type)


def wrapper_of(config: PretrainedConfig) -> Wrapper | None:
    """Return a config as that of a wrapper, None where it is no wrapper around a text model.

    Args:
        config: As transformers read it; it is not changed.

    Raises:
        InputError: The text config has a value that its family does not take.
    """
    parts = getattr(type(config), "sub_configs", {})
    if config.model_type not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES or "text_config" not in parts:
        return None
    inner = config.text_config
    text = _plain(inner)
    notices = list(_without_head_options(text, config.model_type)) if text.model_type in FAMILIES else []
    text.tie_word_embeddings = bool(
        getattr(config, "tie_word_embeddings", getattr(inner, "tie_word_embeddings", False))
    )
    _take_outer_fields(text, config)
    of_text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)
    text.architectures = None if of_text is None else [of_text]
    text._attn_implementation = text._experts_implementation = None
    return Wrapper(config, text, tuple(notices))


def _plain(inner: PretrainedConfig) -> PretrainedConfig:
    """Return a text config as that of the family that computes it.

    Raises:
        InputError: A field has a value that the family does not take.
    """
    model_type = _PLAIN_TYPES.get(inner.model_type)
    if model_type is None:
        return copy.deepcopy(inner)
    plain = CONFIG_MAPPING[model_type]
    known = plain().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    values: dict[str, Any] = {name: value for name, value in inner.to_dict().items() if name in known}
    rotation = {
        name: value for name, value in values["rope_parameters"].items() if name not in _OF_THREE_ROWS
    }
    try:
        config: PretrainedConfig = plain(**{**values, "rope_parameters": rotation})
    except Exception as error:  # that class holds the values to its own types
        raise InputError(
            f"a {model_type} config cannot hold what the text config states: {' '.join(str(error).split())}",
            where="config.json: text_config",
            fix="give the values that the weights were made with",
        ) from error
    return config


def _take_outer_fields(text: PretrainedConfig, config: PretrainedConfig) -> None:
    """Give a text config what a wrapper's config states about the whole: special tokens, and how the files are read."""
    stated = config.to_diff_dict()
    for name in _TOKENS:
        value = getattr(config, name, None)
        if value is not None and (name in stated or getattr(text, name, None) is None):
            setattr(text, name, list(value) if isinstance(value, tuple) else value)
    for name in _OF_THE_FILES:
        if getattr(config, name, None) is not None:
            setattr(text, name, copy.deepcopy(getattr(config, name)))
    pad = getattr(text, "pad_token_id", None)
    if isinstance(pad, int) and pad >= text.vocab_size:
        text.pad_token_id = None  # the default of a class; the embedding has no such row


def _without_head_options(text: PretrainedConfig, wrapper: str) -> Iterator[str]:
    """Take out what only the class for text does behind the head; yields what to say of it."""
    for name, nothing in _BEHIND_HEAD.items():
        value = getattr(text, name, nothing)
        if value != nothing and name not in _APPLIED.get(wrapper, ()):
            setattr(text, name, nothing)
            yield (
                f"{name}={value} of the text config is not applied: the class of the whole model does not apply it, "
                "and the bundle computes what that class does."
            )

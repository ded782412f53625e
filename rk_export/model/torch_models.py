"""transformers' class of a config, built without memory for weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from rk_export.errors import InputError
from rk_export.model.families.registry import family_of
from rk_export.model.outputs import head_of


def empty_model(config: PretrainedConfig, auto: Any = None) -> PreTrainedModel:
    """Build the torch model without memory for weights: parameters on the meta device, buffers real.

    The class is that of `auto_class`; layers keep Hugging Face's form.

    Args:
        config: Of a supported family, or of any that `auto` builds.
        auto: One of transformers' auto classes, for what is none of these.

    Raises:
        InputError: As `transformers_model`.
        UnsupportedModelError: The family is unknown.
    """
    with _parameters_on_meta():
        return transformers_model(config, auto).eval()


def transformers_model(config: PretrainedConfig, auto: Any = None) -> PreTrainedModel:
    """Build transformers' class of a config, float32, without giving its parameters values.

    Args:
        config, auto: As `empty_model` takes them.

    Raises:
        InputError: A field has a value that the class cannot be built with.
        UnsupportedModelError: The family is unknown.
    """
    if auto is None:
        auto = auto_class(config)
    try:
        with no_init_weights():
            model: PreTrainedModel = auto.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # the classes check little: a wrong value raises whatever its first use does
        raise InputError(
            f"transformers builds no {config.model_type} model from it: {_reason(config, error)}",
            where="config.json",
            fix="correct the value, or update transformers if it is one of a later version",
        ) from error
    return model


def auto_class(config: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """Return transformers' class that builds and loads what a config is exported as.

    Raises:
        UnsupportedModelError: The family is unknown.
    """
    family = family_of(config)
    if not family.names(config).is_encoder:
        found: type[_BaseAutoModelClass] = AutoModelForCausalLM
    elif family.classifier(config) is None:
        found = AutoModel
    elif head_of(config) == "tokens":
        found = AutoModelForTokenClassification
    else:
        found = AutoModelForSequenceClassification
    return found


def stored_buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """Return the buffers of a module that checkpoints store, by name: constants that are read but not trained."""
    stored = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in stored]


def _reason(config: PretrainedConfig, error: Exception) -> str:
    """Return what went wrong, with the fields that hold the value where it is an unknown name."""
    if isinstance(error, KeyError) and error.args:
        fields = [name for name, value in config.to_dict().items() if _holds(value, error.args[0])]
        if fields:
            return f"{error.args[0]!r} in {' and '.join(fields)} is nothing that it knows"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _holds(value: object, searched: object) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value == searched or any(_holds(part, searched) for part in parts)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device, but buffers for real: rotary tables are computed, not stored.

    ``torch.device("meta")`` would leave those without values. accelerate's ``init_empty_weights`` does the same as
    this and would be one more package to install for it.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]

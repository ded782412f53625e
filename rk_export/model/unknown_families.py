"""A model type that is none of the families here, and may be one of them in all but its name.

transformers has a class for it. Its tensors must be those of a family, and a tiny model of it must compute what the
family's class computes of the same weights. Options that the family does not have must have no effect, or a value at
which they do nothing. Then the config is read as that family's. The weights of the real model are held to it later,
by the comparison with transformers before any work.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rk_export.errors import UnsupportedModelError
from rk_export.model.class_probe import SAME, Tiny, difference, shapes_of, situations
from rk_export.model.families.registry import FAMILIES, architecture_of, decoder_spec
from rk_export.model.option_probe import NO_OPTIONS, options
from rk_export.model.tensor_differences import differences, listed, once, pattern
from rk_export.model.tiny_version import random_model
from rk_export.model.torch_models import empty_model

_SMALL_SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 160,
    "pad_token_id": 0,
}
_FAR, _REFUSED = 9, 1000  # differences that make a family no relative, and of one that cannot be compared


@dataclass(frozen=True)
class TakenAs:
    """A model of an unknown type, as one of a known family.

    Args:
        config: As the family's.
        stated: As it came.
        error: Largest difference of the two classes on a tiny model, over the largest logit.
        idle: Options that the family does not have and that have no effect, with their values.
    """

    config: PretrainedConfig
    stated: PretrainedConfig
    error: float
    idle: tuple[str, ...]

    @property
    def notice(self) -> str:
        """What the reader of the report must know."""
        beside = f" Its further fields have no effect: {', '.join(self.idle)}." if self.idle else ""
        return (
            f"The model type {self.stated.model_type!r} is none of the families that rk-export knows. It is taken as "
            f"{self.config.model_type!r}: the two classes of transformers have the same tensors, and tiny models of "
            f"both with the same random weights differ by {self.error:.1g} of the largest logit. Tier 0 compares the "
            f"model itself.{beside}"
        )

    @cached_property
    def model(self) -> PreTrainedModel:
        """The class that transformers has for the stated type, without memory for weights."""
        config = copy.deepcopy(self.stated)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # names and shapes are those of the model in floats
        return empty_model(config, AutoModelForCausalLM)


@dataclass(frozen=True)
class _Compared:
    """How a model of an unknown type compares with a family.

    Args:
        differences: How many there are, of those that were counted; the least is nearest.
        reason: Why it is not the family; empty where it is.
        error: Largest difference of logits over the largest.
        idle: Options of the type alone that have no effect.
    """

    differences: int
    reason: str
    error: float = float("inf")
    idle: tuple[str, ...] = ()


def taken_as(config: PretrainedConfig) -> TakenAs:
    """Find the family that a model of an unknown type is.

    Args:
        config: Of a type that is none of `FAMILIES`; it is not changed.

    Raises:
        UnsupportedModelError: It is none; the message says what differs from the nearest.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        architecture_of(config)  # raises
    tiny = _tiny(config)
    nearest: list[_Compared] = []
    for model_type in decoders():
        found = _compared(tiny, model_type)
        if not found.reason:
            return TakenAs(_as_family(config, model_type), config, found.error, found.idle)
        nearest.append(found)
    best = min(nearest, key=lambda found: found.differences)
    raise _refused(config, (best.differences > _FAR and _strange(tiny.shapes)) or best.reason)


def _tiny(config: PretrainedConfig) -> Tiny:
    try:
        return Tiny(config)
    except Exception as error:  # the classes raise whatever their first use of a size does
        try:
            strange = _strange(shapes_of(config))
        except Exception:
            strange = ""
        raise _refused(config, strange or f"no small model of it could be built ({_short(error)})") from error


def _strange(names: Iterable[str]) -> str:
    """Say which tensors of a model are in no family; empty where all are in some."""
    known = {part for model_type in decoders() for part in patterns_of(model_type)}
    own = [name for name in once(names) if pattern(name) not in known]
    return f"no family has tensors like {listed(own)}" if own else ""


@cache
def patterns_of(model_type: str) -> frozenset[str]:
    """Return the names of a family's tensors without numbers; empty where its class builds no model."""
    family = CONFIG_MAPPING[model_type]
    known = family().to_dict().keys() | family.attribute_map.keys()
    small = {name: size for name, size in _SMALL_SIZES.items() if name in known}
    for sizes in (small, {"num_hidden_layers": 2}, {}):
        try:
            return frozenset(map(pattern, shapes_of(family(**sizes))))
        except Exception:  # a size may mean something else to a class
            continue
    return frozenset()


def _compared(tiny: Tiny, model_type: str) -> _Compared:
    try:
        read = _as_family(tiny.config, model_type)
        decoder_spec(read)
        shapes = shapes_of(read)
    except (
        Exception
    ) as error:  # a refusal, or whatever the class raises on values that mean something else to it
        return _Compared(_REFUSED, f"{model_type} refuses its config ({_short(error)})")
    if lines := differences(tiny.shapes, shapes):
        return _Compared(len(lines) + 1, f"of {model_type} it differs in its tensors ({listed(lines)})")
    try:
        apart = difference(situations(random_model(read, tiny.weights)), tiny.logits)
    except Exception as error:
        return _Compared(1, f"{model_type} has the same tensors, and could not be tried ({_short(error)})")
    if apart > SAME:
        shown = f"{apart:.2g} of the largest"
        return _Compared(1, f"{model_type} has the same tensors and computes other logits ({shown})")
    idle, active = options(tiny, partial(_as_family, model_type=model_type))
    reason = (
        f"it computes what {model_type} does, but may part from it by {', '.join(active)}" if active else ""
    )
    return _Compared(0, reason, apart, idle)


def _refused(config: PretrainedConfig, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the model type {config.model_type!r} is not supported, nor is it a known family under another name: {why}",
        where="config.json: model_type",
        fix=f"use one of {', '.join(sorted(FAMILIES))}",
    )


def decoders() -> Iterator[str]:
    """Yield the families of decoders that transformers has a class for."""
    for model_type, family in FAMILIES.items():
        if family.decoder is not None and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            yield model_type


def _as_family(config: PretrainedConfig, model_type: str) -> PretrainedConfig:
    """Return a config as a family's: its values of the fields that the family has."""
    family = CONFIG_MAPPING[model_type]
    names = family().to_dict().keys() - NO_OPTIONS
    values = {name: copy.deepcopy(getattr(config, name)) for name in names if hasattr(config, name)}
    result: PretrainedConfig = family(**values)
    for name in ("quantization_config", "transformers_weights"):
        if getattr(config, name, None) is not None:
            setattr(result, name, copy.deepcopy(getattr(config, name)))
    result.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    result._attn_implementation = result._experts_implementation = None
    return result


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"

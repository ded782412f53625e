"""Whether two classes of transformers compute the same: the logits of one set of weights in several situations."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rk_export.model.tiny_version import VOCABULARY, random_model, tiny_version

SAME = 1e-5  # largest difference over the largest logit
_LENGTH, _PADDED = 40, 6
_FARTHEST = 1 << 20  # float32 tells positions apart, and rotations of them by eye


@torch.no_grad()
def situations(model: PreTrainedModel) -> tuple[Tensor, ...]:
    """Return the logits of a short text, of one at the last positions of the context, and of a padded row.

    Args:
        model: A tiny decoder.

    Raises:
        Exception: Whatever the class raises.
    """
    ids = torch.randint(3, VOCABULARY, (1, _LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, :_PADDED] = 0
    results = [_logits(model, ids), _logits(model, ids, attention_mask=mask)[:, _PADDED:]]
    context = int(getattr(model.config, "max_position_embeddings", None) or _LENGTH)
    parameters = inspect.signature(model.forward).parameters.values()
    if any(one.name == "position_ids" or one.kind is one.VAR_KEYWORD for one in parameters):
        start = max(min(context, _FARTHEST) - _LENGTH, 0)
        results.append(_logits(model, ids, position_ids=torch.arange(start, start + _LENGTH)[None]))
    return tuple(results)


def _logits(model: PreTrainedModel, ids: Tensor, **inputs: Any) -> Tensor:
    result: Tensor = model(input_ids=ids, use_cache=False, **inputs).logits
    return result


def difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Return the largest difference over the largest logit; infinite where it is not defined."""
    if len(found) != len(expected):
        return float("inf")
    errors = []
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape or not bool(torch.isfinite(one).all() and torch.isfinite(other).all()):
            return float("inf")
        errors.append(float((one - other).abs().max() / other.abs().max()))
    return max(errors)


def shapes_of(config: PretrainedConfig) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the tensors of a config's class by name.

    Raises:
        Exception: Whatever the class raises.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


class Tiny:
    """A tiny model of an unknown type.

    Args:
        config: Of the real model.

    Raises:
        Exception: Whatever the class raises on the sizes.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = tiny_version(config)
        self.shapes = shapes_of(self.config)

    @cached_property
    def weights(self) -> Mapping[str, Tensor]:
        """Random ones."""
        weights: dict[str, Tensor] = random_model(self.config).state_dict()
        return weights

    @cached_property
    def logits(self) -> tuple[Tensor, ...]:
        """What it computes in several situations.

        Raises:
            Exception: Whatever the class raises.
        """
        return situations(random_model(self.config, self.weights))

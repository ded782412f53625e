"""The names and shapes that transformers gives the tensors of a model, and which stored tensor is which."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from rk_export.model.families.registry import architecture_of
from rk_export.model.torch_models import transformers_model

# Buffers that older checkpoints store and that are computed today; no model reads them any more.
_OLD_BUFFERS = (
    r"(^|\.)rotary_emb\.(inv_freq|cos_cached|sin_cached)$",
    r"(^|\.)(masked_bias|position_ids|num_batches_tracked)$",
    r"(^|\.)_extra_state$",
)


@dataclass(frozen=True)
class Target:
    """The parameter of a model that a stored tensor belongs to.

    Args:
        name: Of the parameter.
        pattern: Where the tensor is only a part of it, what the names of all parts of its kind look like, such as
            those of the gate matrices of a stack of experts; None where it is the whole.
    """

    name: str
    pattern: str | None

    @property
    def is_part(self) -> bool:
        """Whether the tensor is only a part of the parameter."""
        return self.pattern is not None


class ModelNames:
    """Names and shapes of the parameters of a model, without memory for their values.

    Args:
        config: Of a supported family.

    Raises:
        InputError: transformers builds no model from the config.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self.architecture = architecture_of(config)
        with torch.device("meta"):
            self.model: PreTrainedModel = transformers_model(config)

    @property
    def base(self) -> str:
        """Name of the module that holds the model without its head, such as `model`."""
        return str(self.model.base_model_prefix)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every parameter and stored buffer by name; a tied head is among them."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def ties(self) -> Mapping[str, str]:
        """Of every tied parameter, the one that it shares its values with."""
        return dict(self.model.get_expanded_tied_weights_keys(all_submodels=True))

    @cached_property
    def layer_modules(self) -> frozenset[str]:
        """Paths in the first layer of the modules that hold parameters."""
        first = f"{self.architecture.layers}.0."
        owners = {name.rpartition(".")[0] for name in self.shapes if name.startswith(first)}
        return frozenset(owner.removeprefix(first) for owner in owners)

    def is_harmless(self, name: str) -> bool:
        """Whether a stored tensor that the model does not have is one that transformers passes over as well."""
        ignored = self.model._keys_to_ignore_on_load_unexpected or ()
        return any(re.search(pattern, name) for pattern in (*_OLD_BUFFERS, *ignored))

    def module(self, path: str) -> nn.Module | None:
        """Return the module at a path, or None where the model has none."""
        try:
            module: nn.Module = self.model.get_submodule(path)
        except AttributeError:
            return None
        return module

    def target(self, stored: str) -> Target | None:
        """Return where transformers loads a stored tensor to, None where the model has no place for it."""
        renamings, converters = self._transforms
        name, pattern = rename_source_key(stored, renamings, converters, self.base, self._known)
        if name not in self.shapes:  # it may have been renamed in vain
            name, pattern = rename_source_key(stored, [], [], self.base, self._known)
        return Target(name, pattern) if name in self.shapes else None

    def pieces(self, stored: str) -> tuple[str, ...]:
        """Return the parameters that transformers cuts a stored tensor into, equal blocks of rows; empty for none."""
        renamings, converters = self._transforms
        name, pattern = rename_source_key(stored, renamings, converters, self.base, self._known)
        cut = next((item for item in converters if pattern in item.source_patterns), None)
        if cut is None or len(cut.target_patterns) < 2 or not _cuts_rows(cut):
            return ()
        first, *_ = cut.target_patterns
        names = tuple(name.replace(first, target) for target in cut.target_patterns)
        return names if all(each in self.shapes for each in names) else ()

    def joined(
        self, name: str, parts: Mapping[str, str], read: Callable[[str], torch.Tensor]
    ) -> torch.Tensor:
        """Return the parameter that transformers makes of stored tensors, such as a stack of experts.

        Args:
            name: Of the parameter.
            parts: The pattern of each part (`Target.pattern`) by its stored name.
            read: Reads one of them.
        """
        _, converters = self._transforms
        of_pattern = {pattern: item for item in converters for pattern in item.source_patterns}
        converter = copy.deepcopy(of_pattern[next(iter(parts.values()))])
        for stored in sorted(parts, key=dot_natural_key):
            converter.add_tensor(name, stored, parts[stored], partial(read, stored))
        made = converter.convert(name, model=self.model, config=self.model.config)[name]
        tensor: torch.Tensor = made[0] if isinstance(made, list) else made
        return tensor

    @cached_property
    def _known(self) -> dict[str, torch.Tensor]:
        return dict(self.model.state_dict())

    @cached_property
    def _transforms(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        transforms = get_model_conversion_mapping(self.model)
        return (
            [item for item in transforms if isinstance(item, WeightRenaming)],
            [item for item in transforms if isinstance(item, WeightConverter)],
        )


def _cuts_rows(converter: WeightConverter) -> bool:
    """Whether all that a converter does is to cut one tensor into blocks of rows."""
    operations = converter.operations
    return (
        len(converter.source_patterns) == 1
        and len(operations) == 1
        and (isinstance(operations[0], Chunk) and operations[0].dim == 0)
    )


def renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """Return what transformers makes of a stored tensor's name before it joins tensors that are stored in parts."""
    renamings = [one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)]
    known, base = dict(model.state_dict()), str(model.base_model_prefix)

    def renamed(stored: str) -> str:
        name, _ = rename_source_key(stored, renamings, [], base, known)
        return str(name)

    return renamed

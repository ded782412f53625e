"""Which tensor of a wrapper is which parameter of the text model in it, by transformers' own mapping of names."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cached_property

import torch
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from rk_export.errors import UnsupportedModelError
from rk_export.model.parameter_names import ModelNames, renaming
from rk_export.model.torch_models import empty_model
from rk_export.model.wrappers import Wrapper


class WrapperNames:
    """Names of a wrapper's tensors: of its text model, or of what reads images and sound.

    Args:
        wrapper: The wrapper; its text model is of a supported family.
        text: Names of the text model.

    Raises:
        InputError: transformers builds no model from the config.
        UnsupportedModelError: The text model in it is not the one that the class for text computes.
    """

    def __init__(self, wrapper: Wrapper, text: ModelNames) -> None:
        self.wrapper = wrapper
        config = copy.deepcopy(wrapper.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # names and shapes are those of the model in floats
        self.model: PreTrainedModel = empty_model(config, AutoModelForMultimodalLM)
        self._within = _text_path(self.model, wrapper, text)
        self._head = _head_path(self.model)
        self._renamed = renaming(self.model)
        self._base, self._text_head = text.base, text.architecture.lm_head

    def of_text(self, stored: str) -> str | None:
        """Return a tensor's name in the text model, None for one of the other parts.

        A name that belongs to no part is returned as it is.
        """
        leaf = stored.rpartition(".")[2]
        owner, twin = stored.removesuffix(leaf), self._renamed(stored)
        if twin not in self._known:  # parts of a quantized matrix are where the matrix would be
            twin = self._renamed(f"{owner}weight").removesuffix("weight") + leaf
        if twin.startswith(f"{self._within}."):
            return f"{self._base}.{twin.removeprefix(f'{self._within}.')}"
        if twin.startswith(f"{self._head}."):
            return f"{self._text_head}.{twin.removeprefix(f'{self._head}.')}"
        return None if twin.startswith(self._others) else stored

    def in_wrapper(self, name: str) -> str:
        """Return the name in the wrapper of a tensor of the text model."""
        head, base = f"{self._text_head}.", f"{self._base}."
        if name.startswith(head):
            return f"{self._head}.{name.removeprefix(head)}"
        return f"{self._within}.{name.removeprefix(base)}"

    def is_of_text(self, name: str) -> bool:
        """Whether a parameter of the wrapper is one of the text model's."""
        return name.startswith((f"{self._within}.", f"{self._head}."))

    @cached_property
    def _others(self) -> tuple[str, ...]:
        """Paths of the modules beside the text model, as far as they are stored."""
        owners = {name.rpartition(".")[0] for name in self._known if not self.is_of_text(name)}
        depth = self._within.count(".") + 1
        return tuple({".".join(owner.split(".")[:depth]) + "." for owner in owners})

    @cached_property
    def _known(self) -> Mapping[str, torch.Tensor]:
        return dict(self.model.state_dict())


def _text_path(model: PreTrainedModel, wrapper: Wrapper, text: ModelNames) -> str:
    """Return where the text model is in a wrapper, and hold its class to that of the model for text."""
    inner = wrapper.config.text_config.model_type
    paths = [
        (name, module)
        for name, module in model.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.config.model_type == inner
    ]
    wanted = type(text.model.base_model).__name__
    for name, module in paths:
        if inner != text.model.config.model_type or type(module).__name__ == wanted:
            return str(name)
    found = ", ".join(type(module).__name__ for _, module in paths) or "none of its own"
    raise UnsupportedModelError(
        f"the text model in a {type(model).__name__} ({found}) is not the {wanted} that a bundle is made of",
        where="config.json: text_config",
    )


def _head_path(model: PreTrainedModel) -> str:
    """Return where the output projection of a wrapper is."""
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules() if module is head), None)
    if head is None or path is None:
        raise UnsupportedModelError(
            f"a {type(model).__name__} has no output projection of its own",
            where="config.json: architectures",
        )
    return str(path)

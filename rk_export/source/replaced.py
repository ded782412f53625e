"""Some tensors of a dense model replaced, such as those that were trained for a task."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.errors import InputError
from rk_export.model.description import ModelDescription
from rk_export.source.transformed import Transform

_LAYERS = "layers."


class Replaced(Transform):
    """New values in place of some tensors, as the changes before leave them.

    Args:
        tensors: New values by name: below the layers as `layers.3.self_attn.q_proj.weight`, paths of canonical
            layers, elsewhere as the model names them, such as `model.norm.weight`.

    Attributes:
        variant: A digest of the new values.

    Raises:
        InputError: On loading, if a name is not the model's, or a shape differs.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.variant = _digest(self._tensors)

    def description(self, before: ModelDescription) -> ModelDescription:
        """Return what the model was.

        Raises:
            InputError: If it has no layer that a tensor is named for.
        """
        beyond = [name for name in self._tensors if _layer_of(name) >= before.layer_count]
        if beyond:
            raise InputError("no such layer", where=beyond[0], fix="use tensors of this model")
        return before

    def layer(self, layer: nn.Module, index: int) -> nn.Module:
        """Put the new values of a layer in."""
        prefix = f"{_LAYERS}{index}."
        for name, tensor in self._tensors.items():
            if name.startswith(prefix):
                _replace(layer, name.removeprefix(prefix), tensor, name)
        return layer

    def rest(self, model: PreTrainedModel) -> None:
        """Put the new values outside the layers in."""
        for name, tensor in self._tensors.items():
            if _layer_of(name) < 0:
                _replace(model, name, tensor, name)


def _layer_of(name: str) -> int:
    """Return the layer that a name belongs to, -1 outside the layers."""
    number = name.removeprefix(_LAYERS).partition(".")[0]
    return int(number) if name.startswith(_LAYERS) and number.isdigit() else -1


def _owner(root: nn.Module, path: str, name: str) -> nn.Module:
    parent, _, leaf = path.rpartition(".")
    try:
        module = root.get_submodule(parent)
        module.get_parameter(leaf)
    except AttributeError as error:
        raise InputError(
            "the model has no such tensor", where=name, fix="use tensors of this model"
        ) from error
    return module


def _replace(root: nn.Module, path: str, tensor: Tensor, name: str) -> None:
    """Give a parameter new values; whatever else uses it, such as a tied head, sees them too."""
    old = _owner(root, path, name).get_parameter(path.rpartition(".")[2])
    if old.shape != tensor.shape:
        raise InputError(
            f"it has shape {list(tensor.shape)}, the model's {list(old.shape)}",
            where=name,
            fix="use tensors of this model",
        )
    old.data = tensor.detach().to(old.device, torch.float32, copy=True)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy().data)
    return digest.hexdigest()[:32]

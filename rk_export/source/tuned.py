"""A dense model with some tensors replaced: read layer by layer like the source that it wraps."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.errors import InputError
from rk_export.source.derived import DerivedSource
from rk_export.source.stored import ModelSource

_LAYERS = "layers."


class TunedSource(DerivedSource):
    """A model source whose layers and outer modules have new values in place of some stored ones.

    Everything else is asked of the source that it wraps, so that a prepared source stays prepared: the new values
    are put in after its preparations. Plans, shapes and sizes are those of the source.

    Args:
        source: Any model source.
        tensors: New values by name: below the layers as `layers.3.self_attn.q_proj.weight`, paths of canonical
            layers, elsewhere as the model names them, such as `model.norm.weight`.

    Attributes:
        variant: A digest of the new values. The files of the folder do not tell two tuned sources apart: what is
            cached by weights needs it besides.

    Raises:
        InputError: If a name is not the model's, or a shape differs; on loading, where it is found.
    """

    def __init__(self, source: ModelSource, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(source)
        self._tensors = dict(tensors)
        self.variant = f"{source.variant} {_digest(self._tensors)}"
        beyond = [name for name in self._tensors if _layer_of(name) >= self.layer_count]
        if beyond:
            raise InputError("no such layer", where=beyond[0], fix="use tensors of this model")

    def load_layer(self, model: PreTrainedModel, index: int) -> nn.Module:
        """Fill one layer of a skeleton in float32, in canonical form and with the new values, and return it."""
        layer: nn.Module = model.get_submodule(f"{self.architecture.layers}.{index}")
        fresh = self._is_fresh(layer)
        self._source.load_layer(model, index)
        prefix = f"{_LAYERS}{index}."
        for name, tensor in self._tensors.items():
            if fresh and name.startswith(prefix):
                _replace(layer, name.removeprefix(prefix), tensor, name)
        return layer

    def load_rest(self, model: PreTrainedModel) -> None:
        """Fill embeddings, final norm and lm_head, with the new values."""
        outer = [name for name in self._tensors if _layer_of(name) < 0]
        owners = {name: _owner(model, name, name) for name in outer}
        fresh = {module for module in set(owners.values()) if self._is_fresh(module)}
        self._source.load_rest(model)
        for name in outer:
            if owners[name] in fresh:
                _replace(model, name, self._tensors[name], name)


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

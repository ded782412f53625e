"""The tensors of a quantized embedding and output projection, a shared table once."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from rk_export.model.architecture import Architecture

_EMBEDDING, _HEAD = "embedding.", "head."
_INSIDE_ROTATION = "head."  # where the projection stands in a `RotatedHead`


def tensors_of_tables(model: nn.Module, architecture: Architecture) -> dict[str, Tensor]:
    """Return the tensors of a model's embedding and output projection by name."""
    embedding = model.get_submodule(architecture.embedding).state_dict()
    tensors = {f"{_EMBEDDING}{name}": tensor for name, tensor in embedding.items()}
    if architecture.lm_head is not None:
        shared = {tensor.data_ptr() for tensor in embedding.values()}
        head = model.get_submodule(architecture.lm_head).state_dict()
        tensors |= {
            f"{_HEAD}{name}": tensor for name, tensor in head.items() if tensor.data_ptr() not in shared
        }
    return tensors


def fill_tables(model: nn.Module, architecture: Architecture, tensors: Mapping[str, Tensor]) -> None:
    """Give empty tables what `tensors_of_tables` returned; the tensors are taken as they are, not copied.

    Raises:
        RuntimeError: If tensors are missing, left over or of other shapes.
    """
    embedding = _below(tensors, _EMBEDDING)
    model.get_submodule(architecture.embedding).load_state_dict(embedding, assign=True)
    if architecture.lm_head is None:
        return
    head = model.get_submodule(architecture.lm_head)
    own = _below(tensors, _HEAD)
    shared = {
        name: embedding[name.removeprefix(_INSIDE_ROTATION)] for name in head.state_dict() if name not in own
    }
    head.load_state_dict({**own, **shared}, assign=True)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

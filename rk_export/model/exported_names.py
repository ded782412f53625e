"""Names and values of the exported graph's initializers, from those of the torch model in canonical form."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rk_export.errors import InputError
from rk_export.model.architecture import POSITIONS, Architecture


def rename_tensors(
    architecture: Architecture, tensors: Mapping[str, torch.Tensor], *, tied: bool
) -> dict[str, torch.Tensor]:
    """Map canonical torch tensors to initializers; any part of a model, meta tensors too.

    Args:
        architecture: The family.
        tensors: Canonical torch name -> tensor.
        tied: The output projection is the embedding's initializer and is left out.

    Returns:
        Initializer name -> tensor. Modules that the exported model lacks are left out. Norms that
        store their gain minus one come out as 1 + weight, learned positions without the rows before position 0.

    Raises:
        InputError: A name that the family does not have.
    """
    renamed = {}
    for name, tensor in tensors.items():
        left_out = any(_within(name, module) for module in architecture.unused)
        if left_out or (tied and _is_of_tied_head(architecture, name)):
            continue
        renamed[_onnx_name(architecture, name)] = _exported_value(architecture, name, tensor)
    return renamed


def _onnx_name(architecture: Architecture, name: str) -> str:
    if _within(name, architecture.layers):
        index, _, path = name[len(architecture.layers) + 1 :].partition(".")
        return f"{architecture.onnx_layers}.{index}.{architecture.onnx_path(path)}"
    outer = {architecture.embedding: architecture.onnx_embedding, **architecture.outer}
    if architecture.lm_head and architecture.onnx_lm_head:
        outer[architecture.lm_head] = architecture.onnx_lm_head
    for torch_path, onnx_path in outer.items():
        if _within(name, torch_path):
            return onnx_path + name[len(torch_path) :]
    raise InputError(
        f"{name!r} is not a tensor of the family {architecture.model_type!r}",
        where="model weights",
        fix="export a checkpoint of the plain language model, without adapters or extra heads",
    )


def _exported_value(architecture: Architecture, name: str, tensor: torch.Tensor) -> torch.Tensor:
    module, _, leaf = name.rpartition(".")
    if architecture.unit_offset and module.endswith("norm") and leaf == "weight":
        return (1.0 + tensor.float()).to(tensor.dtype)
    if architecture.outer.get(module) == POSITIONS:
        return tensor[architecture.skipped_positions :]
    return tensor


def _is_of_tied_head(architecture: Architecture, name: str) -> bool:
    """Whether a tensor is the embedding's under another name; a bias is the head's own."""
    head = architecture.lm_head
    return head is not None and _within(name, head) and name != f"{head}.bias"


def _within(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")

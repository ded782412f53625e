"""The weight matrices of a model's layers: what each is called, wherever it is named, and its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from rk_export.model.families import Architecture, Role


class MatrixId(NamedTuple):
    """Which matrix of a model: the layer's number, and the torch path in the canonical layer."""

    layer: int
    path: str

    @property
    def name(self) -> str:
        """The module's name below the layers of any family: `layers.3.self_attn.q_proj`."""
        return f"layers.{self.layer}.{self.path}"

    @property
    def weight(self) -> str:
        """Name of its values among a layer's new tensors: `layers.3.self_attn.q_proj.weight`."""
        return f"{self.name}.weight"

    def torch_path(self, architecture: Architecture) -> str:
        """Return the path of the module in the torch model: `model.layers.3.self_attn.q_proj`."""
        return f"{architecture.layers}.{self.layer}.{self.path}"

    def onnx_path(self, architecture: Architecture) -> str:
        """Return the path of the module in the exported graph."""
        return f"{architecture.onnx_layers}.{self.layer}.{architecture.onnx_path(self.path)}"


@dataclass(frozen=True)
class Matrix:
    """One weight matrix that may be rewritten.

    Args:
        id: Which one.
        role: What it computes.
        shape: (out, in).
    """

    id: MatrixId
    role: Role
    shape: tuple[int, int]

    @property
    def site(self) -> str:
        """Name of its site where it is planned on its own; experts of a layer share one."""
        return f"layers.{self.id.layer}.{'experts' if self.role == 'expert' else self.role}"

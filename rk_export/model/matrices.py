"""The weight matrices of a model's layers: what each is called, wherever it is named, and its shape."""

from __future__ import annotations

from dataclasses import dataclass

from rk_export.matrix_id import MatrixId
from rk_export.model.architecture import Role


@dataclass(frozen=True)
class Matrix:
    """One weight matrix that may be rewritten.

    Args:
        id: Which one.
        role: What it computes.
        shape: (out, in).
        torch_path: Path of its module in the torch model, layers in canonical form.
        onnx_path: Path of its module in the exported graph.
    """

    id: MatrixId
    role: Role
    shape: tuple[int, int]
    torch_path: str
    onnx_path: str

    @property
    def site(self) -> str:
        """Name of its site where it is planned on its own; experts of a layer share one."""
        return f"layers.{self.id.layer}.{'experts' if self.role == 'expert' else self.role}"

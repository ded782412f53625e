"""Which matrix of a model: the one name that everything else is known by."""

from __future__ import annotations

from typing import NamedTuple


class MatrixId(NamedTuple):
    """A weight matrix by the number of its layer and its torch path in the canonical layer."""

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

    def below(self, layers: str) -> str:
        """Return the module's path below a list of layers: `model.layers.3.self_attn.q_proj`."""
        return f"{layers}.{self.layer}.{self.path}"

"""Which modules of a decoder layer read and write the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Wiring:
    """One decoder layer in canonical form; every path is relative to the layer.

    Args:
        norms: Path of a norm in front of a block -> the matrices (and the router) that read its output.
        writers: Matrices whose outputs are added to the residual stream.
        mixes: Matrices that attention, or what stands in its place, begins with.
        value: Path of the value projection, (KV heads * head dimension, d); None in a layer without attention.
        output: Path of the output projection of attention, (d, heads * head dimension); None as for `value`.
        kv_heads: Number of key-value heads.
        mlps: (up, down) of the MLP, or of every expert.
        unit_offset: The norms store their gain minus one.
    """

    norms: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    mixes: tuple[str, ...]
    value: str | None
    output: str | None
    kv_heads: int
    mlps: tuple[tuple[str, str], ...]
    unit_offset: bool = False

    @property
    def readers(self) -> tuple[str, ...]:
        """Every matrix that reads the residual stream through a norm."""
        return tuple(path for paths in self.norms.values() for path in paths)

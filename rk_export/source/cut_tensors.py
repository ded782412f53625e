"""Stored tensors that hold several parameters, one below the other, such as queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from rk_export.errors import InputError
from rk_export.model.parameter_names import ModelNames
from rk_export.source.tensor_files import StoredTensors


@dataclass(frozen=True)
class _Piece:
    """A block of the rows of a stored tensor: which of how many equal ones."""

    stored: str
    index: int
    count: int


class CutTensors:
    """Tensors of another set; some are cut into blocks of rows, each under the name of its parameter.

    Args:
        tensors: The tensors as they are stored.
        pieces: Name of a parameter -> its block.
    """

    def __init__(self, tensors: StoredTensors, pieces: Mapping[str, _Piece]) -> None:
        self._tensors, self._pieces = tensors, dict(pieces)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        stored = self._tensors.shapes
        cut = {piece.stored for piece in self._pieces.values()}
        whole = {name: shape for name, shape in stored.items() if name not in cut}
        return whole | {name: _block(stored[piece.stored], piece) for name, piece in self._pieces.items()}

    @property
    def files(self) -> frozenset[Path]:
        return self._tensors.files

    def place(self, name: str) -> str:
        piece = self._pieces.get(name)
        return self._tensors.place(name if piece is None else piece.stored)

    def read(self, name: str) -> Tensor:
        piece = self._pieces.get(name)
        if piece is None:
            return self._tensors.read(name)
        return self._tensors.read(piece.stored).chunk(piece.count)[piece.index]


def _block(shape: tuple[int, ...], piece: _Piece) -> tuple[int, ...]:
    if shape[0] % piece.count:
        raise InputError(
            f"its {shape[0]} rows are not {piece.count} equal blocks",
            where=piece.stored,
            fix="config.json and the weights do not belong together",
        )
    return (shape[0] // piece.count, *shape[1:])


def cut(tensors: StoredTensors, names: ModelNames) -> StoredTensors:
    """Return tensors with those cut that transformers cuts.

    Raises:
        InputError: The rows of one are no whole number of blocks.
    """
    found = {stored: pieces for stored in tensors.shapes if (pieces := names.pieces(stored))}
    if not found:
        return tensors
    blocks = {
        name: _Piece(stored, index, len(pieces))
        for stored, pieces in found.items()
        for index, name in enumerate(pieces)
    }
    return CutTensors(tensors, blocks)

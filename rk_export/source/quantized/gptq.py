"""GPTQ checkpoints: codes packed along the inputs into int32, as AutoGPTQ and GPTQModel write them.

`qweight` (in * bits / 32, out), `qzeros` (groups, out * bits / 32), `scales` (groups, out) and, with act order,
`g_idx` (in,). The first version of the layout stores zero points less 1. Bits and groups are read from the shapes,
so that modules with rules of their own (`dynamic`) are read as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.passes.numerics.grid import Grid
from rk_export.source.quantized.matrix import (
    FLOATS,
    Quantized,
    StoredMatrix,
    check_dtype,
    check_shape,
    contiguous_groups,
    group_count,
    group_index,
    matrix_shape,
    mismatch,
    number,
    part,
    parts_of,
    prefixes,
    unpack_words,
)
from rk_export.source.tensor_files import StoredTensors

_BITS = (2, 3, 4, 8)
_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def read_gptq(tensors: StoredTensors, config: Mapping[str, Any], *, transposed: bool) -> Quantized:
    """Return the matrices of a GPTQ checkpoint.

    Args:
        tensors: The stored tensors.
        config: Its quantization config.
        transposed: The family's modules hold (in, out).

    Raises:
        InputError: If the layout is another, a part is missing, or parts do not fit each other or the config.
    """
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if config.get("is_marlin_format"):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise InputError(
            f"the GPTQ layout {layout!r} is made for one kernel and not read",
            where="quantization_config: checkpoint_format",
            fix="use the original checkpoint, or one in the layout gptq or gptq_v2",
        )
    matrices = {}
    for module in prefixes(tensors, *_PARTS):
        matrix = _Module(tensors, module, config, is_first_version=layout == "gptq").stored(transposed)
        matrices[f"{module}.weight"] = matrix
    bits = config.get("bits")
    order = ", act order" if config.get("desc_act") else ""
    return Quantized(f"GPTQ ({bits} bits, groups of {config.get('group_size')}{order})", matrices)


class _Module:
    """The parts of one quantized module, checked."""

    def __init__(
        self, tensors: StoredTensors, module: str, config: Mapping[str, Any], *, is_first_version: bool
    ) -> None:
        self._tensors, self._module, self._is_first = tensors, module, is_first_version
        names = [part(tensors, module, leaf) for leaf in _PARTS[:3]]
        (words, self.rows), (_, zero_words), (self._groups, _) = (
            matrix_shape(tensors, name) for name in names
        )
        self.bits = self._checked_bits(names[1], zero_words, config)
        self.columns = words * 32 // self.bits
        check_shape(tensors, names[2], (self._groups, self.rows))
        check_shape(tensors, names[1], (self._groups, zero_words))
        for name in names[:2]:
            check_dtype(tensors, name, {torch.int32}, "int32")
        check_dtype(tensors, names[2], FLOATS, "floats")
        self._index = self._checked_groups(names[2], config)

    def stored(self, transposed: bool) -> StoredMatrix:
        """Return the matrix, as a module that holds (out, in) or, transposed, (in, out) has it."""
        shape = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        return StoredMatrix(
            shape, parts_of(self._tensors, self._module, _PARTS), partial(self._dense, transposed), self.grid
        )

    def grid(self) -> Grid:
        """Return the codes (out, in)."""
        words, zeros, scales = (self._tensors.read(f"{self._module}.{leaf}") for leaf in _PARTS[:3])
        codes = unpack_words(words.T.contiguous(), self.bits)
        zero_points = self._zero_points(zeros).T.to(torch.int16).contiguous()
        return Grid(self.bits, codes, scales.T.contiguous(), zero_points, self._index)

    def _dense(self, transposed: bool) -> Tensor:
        dense = self.grid().dequantize()
        return dense.transpose(0, 1).contiguous() if transposed else dense

    def _zero_points(self, words: Tensor) -> Tensor:
        """Return the zero points (groups, out).

        Where a code divides a word, the first version was made by subtracting 1 from every code of a word at once,
        borrowing across codes, so that this is undone on whole words.
        """
        if not self._is_first:
            return unpack_words(words, self.bits)
        if 32 % self.bits:
            return (unpack_words(words, self.bits) + 1) & ((1 << self.bits) - 1)
        ones = sum(1 << lane for lane in range(0, 32, self.bits))
        return unpack_words(words + ones, self.bits)

    def _checked_bits(self, name: str, zero_words: int, config: Mapping[str, Any]) -> int:
        bits, rest = divmod(zero_words * 32, self.rows)
        words = self._tensors.shapes[f"{self._module}.qweight"][0]
        if rest or bits not in _BITS or words * 32 % bits:
            shapes = [self._tensors.shapes[f"{self._module}.{leaf}"] for leaf in _PARTS[:3]]
            raise mismatch(self._tensors, name, f"qweight, qzeros and scales have shapes {shapes}")
        if not config.get("dynamic") and number(config, "bits") != bits:
            raise mismatch(
                self._tensors, name, f"it has {bits} bits a code, the config says {config['bits']}"
            )
        return bits

    def _checked_groups(self, scales: str, config: Mapping[str, Any]) -> Tensor:
        """Return the group of each column."""
        size = number(config, "group_size")
        if config.get("dynamic"):
            size = -(-self.columns // self._groups)
        if group_count(self.columns, size) != self._groups:
            raise mismatch(
                self._tensors,
                scales,
                f"it has {self._groups} groups, the config's groups of {size} make "
                f"{group_count(self.columns, size)} of {self.columns} inputs",
            )
        name, index = f"{self._module}.g_idx", None
        if name in self._tensors.shapes:
            index = group_index(self._tensors, name, self.columns, self._groups)
            if index is None and config.get("desc_act"):
                raise mismatch(self._tensors, name, "it names group 0 for every input, in spite of act order")
        elif config.get("desc_act") and self._groups > 1:
            part(self._tensors, self._module, "g_idx")
        return contiguous_groups(self.columns, size if size > 0 else self.columns) if index is None else index

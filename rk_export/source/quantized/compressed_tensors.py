"""compressed-tensors checkpoints: integers packed into words, int8 or FP8, with scales by tensor, row, group or block.

`pack-quantized` stores `weight_packed` (out, in * bits / 32), `weight_scale`, `weight_shape`, and, where it is
asymmetric, `weight_zero_point`, packed along the outputs; `int-quantized`, `float-quantized` and `naive-quantized`
store `weight` in 8 bits. Which one a module has is read from its tensors, so that groups of different formats are
read as well.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.passes.numerics.grid import Grid
from rk_export.source.quantized.fp8 import expanded, repeats, scaled_matrix
from rk_export.source.quantized.matrix import (
    FLOAT8,
    FLOATS,
    Quantized,
    StoredMatrix,
    check_dtype,
    check_shape,
    contiguous_groups,
    group_index,
    mismatch,
    part,
    parts_of,
    prefixes,
    unpack_words,
)
from rk_export.source.tensor_files import StoredTensors

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
_PARTS = ("weight_packed", "weight", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_RUN_TIME = (
    *(
        f"{tensor}_{leaf}"
        for tensor in ("input", "output")
        for leaf in ("scale", "zero_point", "global_scale")
    ),
    *("q_scale", "k_scale", "v_scale"),
)


@dataclass(frozen=True)
class _Scheme:
    """How one group of modules is quantized.

    Args:
        bits: Of a code.
        is_symmetric: No zero points.
        group_size: Columns that share a scale; None for all of them.
        block: Rows and columns that share a scale; None for groups, rows and tensors.
    """

    bits: int
    is_symmetric: bool
    group_size: int | None
    block: tuple[int, int] | None


def read_compressed(tensors: StoredTensors, config: Mapping[str, Any], *, transposed: bool) -> Quantized:
    """Return the matrices of a compressed-tensors checkpoint.

    Args:
        tensors: The stored tensors.
        config: Its quantization config.
        transposed: The family's modules hold (in, out); compressed-tensors quantizes none of them.

    Raises:
        InputError: If a format is not read, a part is missing, or parts do not fit each other or the config.
    """
    try:
        groups = list(dict(config.get("config_groups") or {}).values())
        _check_formats(config, groups)
        schemes = list(_schemes(groups))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise InputError(
            f"config_groups cannot be read: {error!r}", where="quantization_config", fix="check the file"
        ) from error
    modules = prefixes(tensors, "weight_packed", "weight_scale", "weight_shape")
    matrices = {f"{module}.weight": _stored(tensors, module, schemes) for module in modules}
    ignored = frozenset(name for name in tensors.shapes if name.rpartition(".")[2] in _RUN_TIME)
    return Quantized(
        f"compressed-tensors ({config.get('format')})", matrices, ignored, tuple(_notes(config, groups))
    )


def _check_formats(config: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> None:
    formats = [str(config.get("format") or ""), *(str(group.get("format") or "") for group in groups)]
    sparse = str((config.get("sparsity_config") or {}).get("format") or "dense")
    unread = [name for name in formats if name not in ("", *_FORMATS)] + [sparse] * (sparse != "dense")
    if unread:
        raise InputError(
            f"the compressed-tensors format {unread[0]!r} is not read",
            where="quantization_config: format",
            fix=f"use the original checkpoint, or one of {', '.join(_FORMATS)}",
        )
    if (config.get("transform_config") or {}).get("config_groups"):
        raise InputError(
            "the checkpoint rotates activations while it runs (transform_config), which the graph does not",
            where="quantization_config: transform_config",
            fix="use the original checkpoint, and a step prepare for rotations that are folded into the weights",
        )


def _schemes(groups: list[Mapping[str, Any]]) -> Iterator[_Scheme]:
    for group in groups:
        if weights := group.get("weights"):
            size, block = weights.get("group_size"), weights.get("block_structure")
            yield _Scheme(
                int(weights.get("num_bits") or 8),
                bool(weights.get("symmetric", True)),
                int(size) if size and int(size) > 0 else None,
                (int(block[0]), int(block[1])) if block else None,
            )


def _notes(config: Mapping[str, Any], groups: list[Mapping[str, Any]]) -> Iterator[str]:
    if any(group.get("input_activations") or group.get("output_activations") for group in groups):
        yield "activations, which the original rounds when it runs, stay in floats"
    if config.get("kv_cache_scheme"):
        yield "the cache, which the original rounds when it runs, stays in floats"


def _stored(tensors: StoredTensors, module: str, schemes: list[_Scheme]) -> StoredMatrix:
    scale = part(tensors, module, "weight_scale")
    if f"{module}.weight_packed" in tensors.shapes:
        check_dtype(tensors, f"{module}.weight_packed", {torch.int32}, "int32")
        return _Packed(tensors, module, schemes).stored()
    weight = part(tensors, module, "weight")
    kinds = FLOAT8 | {torch.int8}
    dtype = check_dtype(tensors, weight, kinds, "int8 or FP8 (floats beside scales are rounded when it runs)")
    shape = tensors.shapes[weight]
    block = _fitting_block(tensors.shapes[scale], shape, schemes)
    if dtype in FLOAT8:
        matrix = scaled_matrix(tensors, weight, scale, block)
        return StoredMatrix(shape, parts_of(tensors, module, _PARTS), matrix.read)
    return _Int8(tensors, module, schemes, block).stored()


def _fitting_block(
    scales: tuple[int, ...], shape: tuple[int, ...], schemes: list[_Scheme]
) -> tuple[int, int] | None:
    """Return the block of rows and columns among the schemes that makes scales of a shape."""
    blocks = [scheme.block or (1, scheme.group_size or shape[-1]) for scheme in schemes]
    fits = (
        block
        for block in blocks
        if len(shape) == 2 and scales == (math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    )
    return next(fits, None)


class _Integers(ABC):
    """What both integer formats share: scales and zero points by row and group."""

    def __init__(self, tensors: StoredTensors, module: str, shape: tuple[int, ...], bits: int) -> None:
        self.tensors, self.module, self.shape, self.bits = tensors, module, shape, bits
        self.scale = f"{module}.weight_scale"
        check_dtype(tensors, self.scale, FLOATS, "floats")

    def stored(self) -> StoredMatrix:
        """Return the matrix."""
        parts = parts_of(self.tensors, self.module, _PARTS)
        return StoredMatrix(self.shape, parts, lambda: self.grid().dequantize(), self.grid)

    @abstractmethod
    def grid(self) -> Grid:
        """Return the codes (out, in)."""


class _Packed(_Integers):
    """Codes packed along the inputs, signed ones shifted to begin at 0."""

    def __init__(self, tensors: StoredTensors, module: str, schemes: list[_Scheme]) -> None:
        packed = f"{module}.weight_packed"
        shape_name = part(tensors, module, "weight_shape")
        check_shape(tensors, shape_name, (2,))
        rows, columns = shape = tuple(int(size) for size in tensors.read(shape_name))
        words = tensors.shapes[packed]
        fitting = [scheme for scheme in schemes if words == (rows, math.ceil(columns * scheme.bits / 32))]
        if not fitting:
            asked = sorted({scheme.bits for scheme in schemes})
            raise mismatch(
                tensors,
                packed,
                f"its shape {list(words)} does not hold {rows} x {columns} codes of {asked} bits",
            )
        super().__init__(tensors, module, shape, fitting[0].bits)
        self._check_scales(fitting)
        self._zero = f"{module}.weight_zero_point" if self._is_asymmetric(fitting) else None

    def grid(self) -> Grid:
        rows, columns = self.shape
        codes = unpack_words(self.tensors.read(f"{self.module}.weight_packed"), self.bits)[:, :columns]
        scales = self.tensors.read(self.scale)
        scales = scales.reshape(1, 1) if scales.numel() == 1 else scales
        return Grid(
            self.bits,
            codes.contiguous(),
            scales.expand(rows, -1).contiguous(),
            self._zero_points(),
            self._groups,
        )

    def _check_scales(self, fitting: list[_Scheme]) -> None:
        rows, columns = self.shape
        shape = self.tensors.shapes[self.scale]
        self._count = count = shape[1] if len(shape) == 2 else 1
        sizes = [scheme.group_size or columns for scheme in fitting]
        size = next((size for size in sizes if math.ceil(columns / size) == count), columns)
        if math.prod(shape) != 1 and shape != (rows, math.ceil(columns / size)):
            raise mismatch(
                self.tensors, self.scale, f"its shape {list(shape)} does not make groups of {sizes}"
            )
        name = f"{self.module}.weight_g_idx"
        index = group_index(self.tensors, name, columns, count) if name in self.tensors.shapes else None
        self._groups = contiguous_groups(columns, size) if index is None else index

    def _is_asymmetric(self, fitting: list[_Scheme]) -> bool:
        if f"{self.module}.weight_zero_point" in self.tensors.shapes:
            return True
        if not any(scheme.is_symmetric for scheme in fitting):
            part(self.tensors, self.module, "weight_zero_point")
        return False

    def _zero_points(self) -> Tensor | None:
        """Return the zero points (out, groups), shifted like the codes."""
        if self._zero is None:
            return None
        rows, groups = self.shape[0], self._count
        stored = self.tensors.read(self._zero)
        if stored.dtype == torch.int32 and stored.shape == (math.ceil(rows * self.bits / 32), groups):
            shifted = unpack_words(stored.T.contiguous(), self.bits)[:, :rows]
            return shifted.transpose(0, 1).to(torch.int16).contiguous()
        signed = stored.reshape(1, 1) if stored.numel() == 1 else stored
        shifted = signed.to(torch.int16) + (1 << (self.bits - 1))
        return shifted.expand(rows, groups).contiguous()


class _Int8(_Integers):
    """Codes in int8."""

    def __init__(
        self, tensors: StoredTensors, module: str, schemes: list[_Scheme], block: tuple[int, int] | None
    ) -> None:
        shape = tensors.shapes[f"{module}.weight"]
        super().__init__(tensors, module, shape, 8)
        sizes = repeats(tensors.shapes[self.scale], shape, block) if len(shape) == 2 else None
        if sizes is None:
            stored = tensors.shapes[self.scale]
            raise mismatch(tensors, self.scale, f"its shape is {list(stored)}, the matrix has {list(shape)}")
        self._block = sizes
        self._zero = f"{module}.weight_zero_point"
        if self._zero in tensors.shapes:
            check_shape(tensors, self._zero, tensors.shapes[self.scale])
        elif schemes and not any(scheme.is_symmetric for scheme in schemes):
            part(tensors, module, "weight_zero_point")

    def grid(self) -> Grid:
        codes = (self.tensors.read(f"{self.module}.weight").to(torch.int16) + 128).to(torch.uint8)
        zero_points = None
        if self._zero in self.tensors.shapes:
            zero_points = self._by_group(self.tensors.read(self._zero)).to(torch.int16) + 128
        groups = contiguous_groups(self.shape[1], self._block[1])
        return Grid(8, codes, self._by_group(self.tensors.read(self.scale)), zero_points, groups)

    def _by_group(self, stored: Tensor) -> Tensor:
        """Return scales or zero points (out, groups) in the type of the scales' values."""
        wide = expanded(stored, self.shape, self._block)[:, :: self._block[1]]
        return wide.to(stored.dtype).contiguous()

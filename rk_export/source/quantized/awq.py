"""AWQ checkpoints in the layout of AutoAWQ's `gemm`: codes packed along the outputs into int32, interleaved.

`qweight` (in, out / 8), `qzeros` (groups, out / 8), `scales` (groups, out).
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
    matrix_shape,
    number,
    part,
    prefixes,
    unpack_words,
)
from rk_export.source.tensor_files import StoredTensors

_PARTS = ("qweight", "qzeros", "scales")
_BITS = 4
# `exllama` names a kernel: the files are those of gemm.
_GEMM = ("gemm", "exllama", "exllamav2")
# Which of eight neighbouring outputs stands in each of a word's eight places.
_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)
_COLUMNS = tuple(_PLACES.index(column) for column in range(8))


def read_awq(tensors: StoredTensors, config: Mapping[str, Any], *, transposed: bool) -> Quantized:
    """Return the matrices of an AWQ checkpoint.

    Args:
        tensors: The stored tensors.
        config: Its quantization config.
        transposed: The family's modules hold (in, out); AWQ has no layout for them.

    Raises:
        InputError: If the layout is another, a part is missing, or parts do not fit each other or the config.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    bits = number(config, "bits" if "bits" in config else "w_bit")
    if version not in _GEMM or bits != _BITS or transposed:
        raise InputError(
            f"AWQ of {bits} bits in the layout {version!r} is not read"
            + (" for modules that hold (in, out)" if transposed else ""),
            where="quantization_config",
            fix="use the original checkpoint, or 4-bit AWQ in the layout gemm",
        )
    size = number(config, "group_size" if "group_size" in config else "q_group_size")
    matrices = {f"{module}.weight": _stored(tensors, module, size) for module in prefixes(tensors, *_PARTS)}
    return Quantized(f"AWQ ({bits} bits, groups of {size})", matrices)


def _stored(tensors: StoredTensors, module: str, size: int) -> StoredMatrix:
    qweight, qzeros, scales = (part(tensors, module, leaf) for leaf in _PARTS)
    (columns, _), (_, rows) = matrix_shape(tensors, qweight), matrix_shape(tensors, scales)
    groups = group_count(columns, size)
    check_shape(tensors, scales, (groups, rows))
    check_shape(tensors, qweight, (columns, rows // 8))
    check_shape(tensors, qzeros, (groups, rows // 8))
    for name in (qweight, qzeros):
        check_dtype(tensors, name, {torch.int32}, "int32")
    check_dtype(tensors, scales, FLOATS, "floats")
    grid = partial(_grid, tensors, module, size if size > 0 else columns)
    return StoredMatrix(
        (rows, columns), frozenset((qweight, qzeros, scales)), lambda: grid().dequantize(), grid
    )


def _grid(tensors: StoredTensors, module: str, size: int) -> Grid:
    words, zeros, scales = (tensors.read(f"{module}.{leaf}") for leaf in _PARTS)
    codes = _unpacked(words)
    return Grid(
        _BITS,
        codes.T.contiguous(),
        scales.T.contiguous(),
        _unpacked(zeros).T.to(torch.int16).contiguous(),
        contiguous_groups(len(codes), size),
    )


def _unpacked(words: Tensor) -> Tensor:
    """Return the codes (n, out) of words (n, out / 8)."""
    eights = unpack_words(words, _BITS).view(len(words), -1, 8)
    return eights[..., _COLUMNS].flatten(1)

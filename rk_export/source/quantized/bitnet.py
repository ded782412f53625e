"""BitNet b1.58 checkpoints (arXiv 2402.17764): matrices of -1, 0 and 1 times one scale.

Packed ones hold four rows in a byte, in two bits each, and the scale beside it: `bitlinear` divides by it,
`autobitlinear` multiplies. Master weights (`online`) are floats that are rounded when the model is loaded.
"""

from __future__ import annotations

import re
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
    matrix_shape,
    part,
    prefixes,
)
from rk_export.source.tensor_files import StoredTensors

_ROWS_IN_A_BYTE = 4
_SMALLEST_MEAN = 1e-5
_IN_LAYERS = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
_NOTE = "activations, which the original rounds to int8 when it runs, stay in floats"


def read_bitnet(tensors: StoredTensors, config: Mapping[str, Any], *, transposed: bool) -> Quantized:
    """Return the matrices of a BitNet checkpoint.

    Args:
        tensors: The stored tensors.
        config: Its quantization config.
        transposed: Not used: no family with (in, out) modules is stored so.

    Raises:
        InputError: If the linear modules have a norm of their own, a scale is missing, or parts do not fit each other.
    """
    del transposed
    if config.get("use_rms_norm"):
        raise InputError(
            "use_rms_norm puts a norm into every linear module, which the family does not have",
            where="config.json: quantization_config",
            fix="use a checkpoint without it",
        )
    if config.get("quantization_mode") == "online":
        kept = tuple(config.get("modules_to_not_convert") or ())
        names = (name for name in sorted(tensors.shapes) if _IN_LAYERS.search(name))
        matrices = {name: _rounded(tensors, name) for name in names if not name.startswith(kept)}
        return Quantized("BitNet master weights", matrices, notes=(_NOTE,))
    multiplies = config.get("linear_class") == "autobitlinear"
    packed = {
        f"{module}.weight": _packed(tensors, module, multiplies=multiplies)
        for module in prefixes(tensors, "weight_scale")
    }
    return Quantized("BitNet (2 bits)", packed, notes=(_NOTE,))


def _packed(tensors: StoredTensors, module: str, *, multiplies: bool) -> StoredMatrix:
    weight, scale = (part(tensors, module, leaf) for leaf in ("weight", "weight_scale"))
    check_dtype(tensors, weight, {torch.uint8}, "uint8")
    check_dtype(tensors, scale, FLOATS, "floats")
    check_shape(tensors, scale, (1,))
    rows, columns = matrix_shape(tensors, weight)

    def grid() -> Grid:
        stored = tensors.read(scale).to(torch.float32)
        return _grid(_unpacked(tensors.read(weight)), stored if multiplies else 1.0 / stored)

    return StoredMatrix(
        (_ROWS_IN_A_BYTE * rows, columns), frozenset((weight, scale)), lambda: grid().dequantize(), grid
    )


def _rounded(tensors: StoredTensors, name: str) -> StoredMatrix:
    """Return a matrix of floats as the original rounds it: to the mean of its absolute values."""
    check_dtype(tensors, name, FLOATS, "floats")
    grid = partial(_ternary, tensors, name)
    shape = matrix_shape(tensors, name)
    return StoredMatrix(shape, frozenset((name,)), lambda: grid().dequantize(), grid)


def _ternary(tensors: StoredTensors, name: str) -> Grid:
    matrix = tensors.read(name).to(torch.float32)
    scale = matrix.abs().mean().clamp(min=_SMALLEST_MEAN)
    return _grid((matrix * (1.0 / scale)).round().clamp(-1, 1).add(1).to(torch.uint8), scale.reshape(1))


def _unpacked(packed: Tensor) -> Tensor:
    """Return the codes 0 to 2 (4 * rows, columns): the two lowest bits of all bytes are the first rows."""
    return torch.cat([(packed >> shift) & 3 for shift in range(0, 8, 2)])


def _grid(codes: Tensor, scale: Tensor) -> Grid:
    rows, columns = codes.shape
    zero_points = torch.ones(rows, 1, dtype=torch.int16)
    return Grid(2, codes, scale.expand(rows, 1), zero_points, torch.zeros(columns, dtype=torch.int64))

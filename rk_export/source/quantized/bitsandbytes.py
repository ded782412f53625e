"""bitsandbytes checkpoints: 4 bits (nf4, fp4) in blocks, or int8 by row; its own package dequantizes them.

4-bit matrices are flat bytes; their shape and type stand in `X.weight.quant_state.bitsandbytes__nf4`, the blocks'
maxima in `X.weight.absmax`, quantized once more where there is `X.weight.nested_absmax`. Int8 rows have `X.SCB`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.json_codec import parse_json
from rk_export.source.quantized.matrix import (
    FLOATS,
    INCOMPLETE,
    Quantized,
    StoredMatrix,
    check_dtype,
    check_shape,
    matrix_shape,
    mismatch,
)
from rk_export.source.tensor_files import StoredTensors

_LONGEST_STATE = 1 << 16  # bytes; those of bitsandbytes have some 200

_STATE = ".quant_state.bitsandbytes__"
_FOUR_BIT_PARTS = ("absmax", "quant_map")
_NESTED_PARTS = ("nested_absmax", "nested_quant_map")
_ROW_LAYOUT = 0


def read_bitsandbytes(tensors: StoredTensors, config: Mapping[str, Any], *, transposed: bool) -> Quantized:
    """Return the matrices of a bitsandbytes checkpoint.

    Args:
        tensors: The stored tensors.
        config: Its quantization config.
        transposed: The family's modules hold (in, out); bitsandbytes stores (out, in) always.

    Raises:
        InputError: If the package is not installed, a part is missing, or parts do not fit each other.
    """
    functions = _package()
    matrices: dict[str, StoredMatrix] = {}
    for name in sorted(tensors.shapes):
        if _STATE in name:
            weight = name.partition(_STATE)[0]
            matrices[weight] = _four_bit(functions, tensors, weight, name, transposed)
        elif name.endswith(".SCB"):
            weight = f"{name.removesuffix('.SCB')}.weight"
            matrices[weight] = _int8(functions, tensors, weight, name, transposed)
    for name in sorted(tensors.shapes.keys() - {part for one in matrices.values() for part in one.parts}):
        if name.endswith(".weight") and tensors.read(name).dtype in (torch.uint8, torch.int8):
            raise InputError(
                f"the scales of {name!r} are missing (quant_state or SCB), without which it has no values",
                where=tensors.place(name),
                fix=INCOMPLETE,
            )
    bits = 4 if config.get("load_in_4bit") else 8
    notes = (
        () if bits == 4 else ("activations, which the original rounds to int8 when it runs, stay in floats",)
    )
    return Quantized(f"bitsandbytes ({bits} bits)", matrices, notes=notes)


def _package() -> Any:
    try:
        return import_module("bitsandbytes.functional")
    except ImportError as error:
        raise InputError(
            f"the checkpoint is quantized by bitsandbytes, which cannot be imported ({error})",
            where="quantization_config",
            fix="install bitsandbytes, which dequantizes it, or use the original checkpoint",
        ) from error


def _four_bit(
    functions: Any, tensors: StoredTensors, weight: str, state_name: str, transposed: bool
) -> StoredMatrix:
    state = _state(tensors, state_name)
    leaves = (*_FOUR_BIT_PARTS, *(_NESTED_PARTS if "nested_blocksize" in state else ()))
    parts = (weight, *(f"{weight}.{leaf}" for leaf in leaves))
    for name in parts:
        _require(tensors, name, state_name)
    rows, columns = state["shape"]
    stored = tensors.read(weight)
    if stored.numel() * stored.element_size() * 2 < rows * columns:
        raise mismatch(tensors, weight, f"it is too short for {rows} x {columns} values of 4 bits")
    check_shape(tensors, f"{weight}.absmax", (math.ceil(rows * columns / state["blocksize"]),))
    return StoredMatrix(
        (columns, rows) if transposed else (rows, columns),
        frozenset((*parts, state_name)),
        partial(_read_four_bit, functions, tensors, (*parts, state_name), transposed),
    )


def _read_four_bit(
    functions: Any, tensors: StoredTensors, parts: tuple[str, ...], transposed: bool
) -> Tensor:
    weight, *others = parts
    stored = {name.removeprefix(f"{weight}."): tensors.read(name) for name in others}
    state = functions.QuantState.from_dict(stored, torch.device("cpu"))
    state.dtype = torch.float32  # it would round the values to the type that the original computes in
    dense: Tensor = functions.dequantize_4bit(tensors.read(weight).view(torch.uint8).reshape(-1, 1), state)
    return dense.T.contiguous() if transposed else dense


def _state(tensors: StoredTensors, name: str) -> dict[str, Any]:
    """Return the JSON that is stored as bytes; it has the shape, the block size and the type.

    Raises:
        InputError: If it cannot be read, or lacks the shape or the block size.
    """
    try:
        if math.prod(tensors.shapes[name]) > _LONGEST_STATE:
            raise ValueError(f"it has {math.prod(tensors.shapes[name])} bytes")
        stored = bytes(tensors.read(name).flatten().tolist())
        state: dict[str, Any] = parse_json(stored, where=name, fix=INCOMPLETE)
        rows, columns = state["shape"]
        if min(int(rows), int(columns), int(state["blocksize"])) < 1:
            raise ValueError("a size below 1")
    except (ValueError, KeyError, TypeError) as error:
        raise mismatch(tensors, name, f"it is no quantization state ({error})") from error
    return state


def _int8(functions: Any, tensors: StoredTensors, weight: str, scales: str, transposed: bool) -> StoredMatrix:
    _require(tensors, weight, scales)
    check_dtype(tensors, weight, {torch.int8}, "int8")
    check_dtype(tensors, scales, FLOATS, "floats")
    rows, columns = matrix_shape(tensors, weight)
    check_shape(tensors, scales, (rows,))
    parts = {weight, scales}
    if f"{weight}_format" in tensors.shapes:
        parts.add(f"{weight}_format")
        if (layout := int(tensors.read(f"{weight}_format"))) != _ROW_LAYOUT:
            raise InputError(
                f"{weight!r} has bitsandbytes' tiled layout {layout}, made for one kernel",
                where=tensors.place(weight),
                fix="save it anew with a current bitsandbytes, or use the original checkpoint",
            )
    return StoredMatrix(
        (columns, rows) if transposed else (rows, columns),
        frozenset(parts),
        partial(_read_int8, functions, tensors, weight, scales, transposed),
    )


def _read_int8(functions: Any, tensors: StoredTensors, weight: str, scales: str, transposed: bool) -> Tensor:
    dense: Tensor = functions.int8_vectorwise_dequant(
        tensors.read(weight), tensors.read(scales).to(torch.float32)
    )
    return dense.T.contiguous() if transposed else dense


def _require(tensors: StoredTensors, name: str, beside: str) -> None:
    if name not in tensors.shapes:
        raise InputError(
            f"{name!r} is missing, without which its matrix has no values",
            where=tensors.place(beside),
            fix=INCOMPLETE,
        )

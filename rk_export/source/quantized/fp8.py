"""FP8 checkpoints: every value is a float of 8 bits times the scale of its tensor, row or block.

The scale of `X.weight` is `X.weight_scale_inv` (DeepSeek, Qwen) or `X.weight_scale`; in spite of its name the former
multiplies too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.source.quantized.matrix import (
    FLOAT8,
    FLOATS,
    INCOMPLETE,
    Quantized,
    StoredMatrix,
    check_dtype,
    mismatch,
)
from rk_export.source.tensor_files import StoredTensors

_SUFFIXES = ("_scale_inv", "_scale")
_INPUTS = ("input_scale", "activation_scale", "input_scale_ub", "k_scale", "v_scale")
SCALES = frozenset({*FLOATS, torch.float8_e8m0fnu})


def read_fp8(tensors: StoredTensors, config: Mapping[str, Any], *, transposed: bool) -> Quantized:
    """Return the matrices of an FP8 checkpoint.

    Args:
        tensors: The stored tensors.
        config: Its quantization config.
        transposed: The family's modules hold (in, out), which is how they are stored then.

    Raises:
        InputError: If a scale or its matrix is missing, or they do not fit each other.
    """
    block = _block(config)
    ignored = frozenset(name for name in tensors.shapes if name.rpartition(".")[2] in _INPUTS)
    matrices = {}
    for scale in sorted(tensors.shapes.keys() - ignored):
        name = next((scale.removesuffix(suffix) for suffix in _SUFFIXES if scale.endswith(suffix)), None)
        if name is not None:
            matrices[name] = scaled_matrix(tensors, name, scale, block)
    for name in sorted(
        tensors.shapes.keys() - ignored - {part for one in matrices.values() for part in one.parts}
    ):
        if len(tensors.shapes[name]) > 1 and tensors.read(name).dtype in FLOAT8:
            raise InputError(
                f"{name}_scale_inv and {name}_scale are missing, without which {name!r} has no values",
                where=tensors.place(name),
                fix=INCOMPLETE,
            )
    notes = ("activations, which the original rounds to FP8 when it runs, stay in floats",)
    return Quantized("FP8 with scales", matrices, ignored, notes)


def scaled_matrix(
    tensors: StoredTensors, name: str, scale: str, block: tuple[int, int] | None
) -> StoredMatrix:
    """Return an FP8 matrix (..., out, in) with its scales, checked.

    Args:
        tensors: The stored tensors.
        name: Of the matrix.
        scale: Name of its scales.
        block: Rows and columns that share a scale; None finds them from the shapes.

    Raises:
        InputError: If the matrix is missing, or they do not fit each other.
    """
    if name not in tensors.shapes:
        raise InputError(
            f"{name!r} is missing, whose scales are there", where=tensors.place(scale), fix=INCOMPLETE
        )
    check_dtype(tensors, name, FLOAT8, "FP8")
    check_dtype(tensors, scale, SCALES, "floats")
    shape = tensors.shapes[name]
    if len(shape) < 2 or repeats(tensors.shapes[scale], shape, block) is None:
        raise mismatch(
            tensors, scale, f"its shape is {list(tensors.shapes[scale])}, the matrix has {list(shape)}"
        )
    return StoredMatrix(shape, frozenset((name, scale)), partial(_scaled, tensors, name, scale, block))


def repeats(
    scales: tuple[int, ...], shape: tuple[int, ...], block: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Return how many rows and columns each scale stands for, or None where shapes do not fit.

    Args:
        scales: Shape of the scales: (), (1,), (out,), or (..., r, c).
        shape: Shape of the matrix (..., out, in).
        block: What the config says; where it does not fit, equal blocks are made as transformers does.
    """
    rows, columns = shape[-2:]
    if math.prod(scales) == 1:
        return rows, columns
    if scales == (rows,):
        return 1, columns
    if len(scales) != len(shape) or scales[:-2] != shape[:-2]:
        return None
    counts = scales[-2:]
    if block is not None and counts == (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        return block
    if any(size % count for size, count in zip((rows, columns), counts, strict=True)):
        return None
    return rows // counts[0], columns // counts[1]


def expanded(scales: Tensor, shape: tuple[int, ...], block: tuple[int, int] | None) -> Tensor:
    """Return scales, float32, for every entry of a matrix of a shape that `repeats` takes."""
    sizes = repeats(tuple(scales.shape), shape, block)
    if sizes is None:
        raise ValueError(f"scales of shape {tuple(scales.shape)} do not fit {shape}")
    wide = scales.to(torch.float32)
    if scales.numel() == 1:
        return wide.reshape(()).expand(shape)
    if wide.ndim == 1:
        wide = wide[:, None]
    wide = wide.repeat_interleave(sizes[0], -2)[..., : shape[-2], :]
    return wide.repeat_interleave(sizes[1], -1)[..., : shape[-1]]


def _scaled(tensors: StoredTensors, name: str, scale: str, block: tuple[int, int] | None) -> Tensor:
    values = tensors.read(name).to(torch.float32)
    return values * expanded(tensors.read(scale), tuple(values.shape), block)


def _block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    size = config.get("weight_block_size")
    if size is None:
        return None
    if (
        not isinstance(size, list | tuple)
        or len(size) != 2
        or not all(isinstance(n, int) and n > 0 for n in size)
    ):
        raise InputError(
            f"weight_block_size is {size!r}, two whole numbers were expected",
            where="quantization_config",
            fix="check the file",
        )
    return size[0], size[1]

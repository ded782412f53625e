"""What the readers of quantized checkpoints share: a matrix with its parts, refusals, packed words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rk_export.errors import InputError
from rk_export.passes.numerics.grid import Grid
from rk_export.source.tensor_files import StoredTensors

FLOAT8 = frozenset({torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32})
INCOMPLETE = "the checkpoint is incomplete: download it again"


@dataclass(frozen=True)
class StoredMatrix:
    """One quantized matrix of a checkpoint.

    Args:
        shape: Of the dense tensor, as the module that it belongs to has it.
        parts: Names of the tensors that stand for it.
        read: Returns the dense tensor, float32.
        grid: Returns its codes (out, in); None where they are not on an integer grid.
    """

    shape: tuple[int, ...]
    parts: frozenset[str]
    read: Callable[[], Tensor]
    grid: Callable[[], Grid] | None = None


@dataclass(frozen=True)
class Quantized:
    """What a reader found in a checkpoint.

    Args:
        format: How its matrices are stored, for messages.
        matrices: By the name of the dense tensor.
        ignored: Tensors that only matter when activations or caches are quantized too.
        notes: What of the original's arithmetic is left out, a sentence each.
    """

    format: str
    matrices: Mapping[str, StoredMatrix]
    ignored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = field(default=())


def prefixes(tensors: StoredTensors, *parts: str) -> list[str]:
    """Return the names of the modules that have one of some parts, sorted."""
    found = (name.rpartition(".") for name in tensors.shapes)
    return sorted({module for module, _, leaf in found if leaf in parts})


def part(tensors: StoredTensors, module: str, leaf: str) -> str:
    """Return the name of a part that a quantized module must have.

    Raises:
        InputError: If the checkpoint lacks it.
    """
    name = f"{module}.{leaf}"
    if name not in tensors.shapes:
        beside = next(other for other in sorted(tensors.shapes) if other.startswith(module + "."))
        raise InputError(
            f"{name!r} is missing, without which the quantized {module!r} has no values",
            where=tensors.place(beside),
            fix=INCOMPLETE,
        )
    return name


def parts_of(tensors: StoredTensors, module: str, leaves: Iterable[str]) -> frozenset[str]:
    """Return the names of those parts of a module that are stored."""
    return frozenset(name for leaf in leaves if (name := f"{module}.{leaf}") in tensors.shapes)


def check_shape(tensors: StoredTensors, name: str, expected: tuple[int, ...]) -> None:
    """Refuse a part of another shape.

    Raises:
        InputError: Names both shapes.
    """
    if tensors.shapes[name] != expected:
        raise mismatch(
            tensors, name, f"it has shape {list(tensors.shapes[name])}, {list(expected)} was expected"
        )


def check_dtype(
    tensors: StoredTensors, name: str, allowed: Collection[torch.dtype], what: str
) -> torch.dtype:
    """Return the stored type of a part, or refuse it.

    Raises:
        InputError: If it is not among those allowed.
    """
    dtype = tensors.read(name).dtype
    if dtype not in allowed:
        raise mismatch(tensors, name, f"it holds {dtype}, {what} was expected")
    return dtype


def mismatch(tensors: StoredTensors, name: str, what: str) -> InputError:
    """Return the error of a part that does not fit the others or the config."""
    return InputError(
        f"tensor {name!r} does not fit: {what}",
        where=tensors.place(name),
        fix="config.json and the weights do not belong together, or the checkpoint is damaged: download it again",
    )


def number(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """Return a whole number of a quantization config.

    Raises:
        InputError: If it is missing without a default, or no whole number.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(
            f"{key} is {value!r}, a whole number was expected",
            where="quantization_config",
            fix="check the file",
        )
    return value


def matrix_shape(tensors: StoredTensors, name: str) -> tuple[int, int]:
    """Return the shape of a part that has two dimensions.

    Raises:
        InputError: If it has others.
    """
    shape = tensors.shapes[name]
    if len(shape) != 2:
        raise mismatch(tensors, name, f"it has shape {list(shape)}, two dimensions were expected")
    return shape[0], shape[1]


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Return the codes in int32 words (..., n), low bits first, as uint8 (..., n * 32 // bits).

    Codes that do not divide a word run on into the next one: 3 words hold 32 codes of 3 bits.
    """
    run = math.gcd(bits, 32)
    in_run, codes = bits // run, 32 // run
    padded = torch.nn.functional.pad(words, (0, -words.shape[-1] % in_run))
    runs = padded.reshape(*padded.shape[:-1], -1, in_run)
    lanes = []
    for start in range(0, codes * bits, bits):
        word, shift = divmod(start, 32)
        lane = (runs[..., word] >> shift) & (
            2 ** min(bits, 32 - shift) - 1
        )  # the shift carries the sign along
        if shift + bits > 32:
            lane = lane | ((runs[..., word + 1] << (32 - shift)) & (2**bits - 1))
        lanes.append(lane.to(torch.uint8))
    return torch.stack(lanes, dim=-1).flatten(-2)[..., : words.shape[-1] * 32 // bits]


def contiguous_groups(columns: int, size: int) -> Tensor:
    """Return the group of each column where groups of a size lie side by side, int64 (columns,)."""
    return torch.arange(columns) // size


def group_count(columns: int, size: int) -> int:
    """Return how many groups a row has; a size that is not positive means one."""
    return 1 if size <= 0 else math.ceil(columns / size)


def group_index(tensors: StoredTensors, name: str, columns: int, groups: int) -> Tensor | None:
    """Return the stored group of each column, int64 (columns,), or None where all are zero though there are more.

    Raises:
        InputError: If its shape is another, or it names a group that does not exist.
    """
    check_shape(tensors, name, (columns,))
    index = tensors.read(name).to(torch.int64)
    if groups > 1 and not bool(index.any()):
        return None
    if int(index.min()) < 0 or int(index.max()) >= groups:
        raise mismatch(tensors, name, f"it names group {int(index.max())} of {groups}")
    return index

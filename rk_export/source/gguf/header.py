"""Header of a GGUF file: its metadata and its table of tensors, read without touching a weight.

``gguf.GGUFReader`` makes an array of every token of the vocabulary and needs seconds for a large one; a refusal
should not wait for that. Every length is checked against the file, so that a truncated or hostile header ends
in a message and not in memory.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.source.stand_ins import stand_in

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_MAGIC = b"GGUF"
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_DEPTH = 4  # arrays of arrays; no file in use nests deeper
_DIMENSIONS = 4  # of a tensor, as in llama.cpp
# The largest headers in use are vocabularies of 262,144 tokens with their merges, some 10 MB.
_LONGEST = 1 << 26
_MOST = 100_000  # keys, and tensors
_PART = re.compile(r"part-?\d|\d{5}-of-\d{5}|\.\d{3}$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a GGUF file.

    Attributes:
        shape: As transformers has it, rows first.
        kind: How the values are encoded.
        begin: First byte in the file.
        size: Bytes in the file.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    begin: int
    size: int

    def values(self, index: int | None = None) -> np.ndarray:
        """Return the tensor, or the matrix ``index`` of a stack, dequantized to float32."""
        shape, begin, size = self.shape, self.begin, self.size
        if index is not None:
            shape, size = shape[1:], size // shape[0]
            begin += index * size
        raw = np.memmap(self.path, dtype=np.uint8, mode="r", offset=begin, shape=(size,))
        rows = raw.reshape(gguf.quant_shape_to_byte_shape(shape, self.kind))
        values: np.ndarray = gguf.dequantize(rows, self.kind).reshape(shape)
        return values if values.flags.writeable else values.copy()  # floats come as a view of the file


@dataclass(frozen=True)
class Header:
    """Metadata by key, and tensors in the file's order."""

    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]


def read_header(path: Path) -> Header:
    """Read the header of one GGUF file.

    Raises:
        InputError: The file is missing, no GGUF, damaged, or shorter than its header says.
        UnsupportedModelError: It is big-endian, of another version, or holds an encoding that is not known.
    """
    _check_magic(path)
    with path.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(path, data)
        except (struct.error, UnicodeDecodeError, ValueError, OverflowError) as error:
            raise InputError(
                f"the GGUF file is truncated or damaged: its header cannot be read ({error})",
                where=str(path),
                fix="download it again and compare its size with the publisher's",
            ) from error


def begins_as_gguf(path: Path) -> bool:
    """Say whether a file begins as a GGUF file does, whatever its name."""
    return _magic(path) == _MAGIC


def _magic(path: Path) -> bytes:
    with path.open("rb") as handle:
        return handle.read(len(_MAGIC))


def _check_magic(path: Path) -> None:
    if not path.is_file():
        raise InputError("no such file", where=str(path), fix="give the path of a .gguf file")
    magic = _magic(path)
    if magic == _MAGIC:
        return
    if found := stand_in(path):
        raise InputError(f"is {found}", where=str(path), fix="download the file itself")
    if _PART.search(path.stem):
        fix = "if it is one piece of a file that was cut, join the pieces in order first"
    else:
        fix = "download it again"
    raise InputError(
        f"not a GGUF file: it begins with {magic!r} and not with 'GGUF'", where=str(path), fix=fix
    )


def _parse(path: Path, data: mmap.mmap) -> Header:
    (version,) = struct.unpack_from("<I", data, 4)
    if version & 0xFFFF == 0:
        raise UnsupportedModelError(
            "the GGUF file is big-endian", where=str(path), fix="convert it with gguf-convert-endian"
        )
    if version not in _VERSIONS:
        raise UnsupportedModelError(
            f"GGUF version {version} is not read", where=str(path), fix="known: 2 and 3"
        )
    tensor_count, key_count = struct.unpack_from("<QQ", data, 8)
    if max(tensor_count, key_count) > _MOST:
        raise ValueError(f"it states {key_count:,} keys and {tensor_count:,} tensors")
    cursor = _Cursor(data, 24)
    metadata = {}
    for _ in range(key_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    table = [_entry(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"general.alignment is {alignment}")
    start = -(-cursor.position // alignment) * alignment
    tensors = tuple(_placed(path, start, *entry) for entry in table)
    _check_places(path, tensors, len(data))
    return Header(metadata, tensors)


class _Cursor:
    """Reads one value after the other; ``struct.error`` past the end of the file."""

    def __init__(self, data: mmap.mmap, position: int) -> None:
        self._data, self.position = data, position

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack_from(layout, self._data, self.position)
        self.position += struct.calcsize(layout)
        return value

    def string(self) -> str:
        return self._bytes(self.scalar("<Q")).decode()

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY and depth < _DEPTH:
            kind, count = struct.unpack("<IQ", self._bytes(12))
            return self._array(kind, count, depth)
        if kind not in _SCALARS:
            raise ValueError(f"unknown kind of value {kind}")
        return self.scalar(_SCALARS[kind])

    def _array(self, kind: int, count: int, depth: int) -> list[Any]:
        if kind in _SCALARS:
            dtype = np.dtype(_SCALARS[kind])
            values: list[Any] = np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()
            return values
        return [self.value(kind, depth + 1) for _ in range(count)]

    def _bytes(self, count: int) -> bytes:
        end = self.position + count
        if end > _LONGEST:
            raise struct.error(f"it is longer than {_LONGEST:,} bytes")
        if end > len(self._data):
            raise struct.error(f"it states {count} bytes where {len(self._data) - self.position} are left")
        self.position, begin = end, self.position
        return self._data[begin:end]


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return name, shape, encoding and offset of the next row of the table of tensors."""
    name = cursor.string()
    dimensions = cursor.scalar("<I")
    if dimensions > _DIMENSIONS:
        raise ValueError(f"tensor {name} has {dimensions} dimensions")
    shape = [cursor.scalar("<Q") for _ in range(dimensions)]
    if 0 in shape:
        raise ValueError(f"tensor {name} is empty")
    return name, tuple(reversed(shape)), cursor.scalar("<I"), cursor.scalar("<Q")


def _placed(
    path: Path, start: int, name: str, shape: tuple[int, ...], code: int, offset: int
) -> StoredTensor:
    try:
        kind = gguf.GGMLQuantizationType(code)
    except ValueError as error:
        raise UnsupportedModelError(
            f"tensor {name} is encoded as type {code}, which gguf {_gguf_version()} does not know",
            where=str(path),
            fix="take a file in another quantization, or a newer gguf package",
        ) from error
    block, size = gguf.GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise ValueError(f"rows of {name} have {shape[-1]} values, no multiple of {block}")
    return StoredTensor(path, name, shape, kind, start + offset, math.prod(shape) // block * size)


def _gguf_version() -> str:
    from importlib.metadata import version

    return version("gguf")


def _check_places(path: Path, tensors: tuple[StoredTensor, ...], length: int) -> None:
    """Every tensor is named once and lies inside the file, beside the others."""
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise ValueError(f"tensor {tensor.name} is listed twice")
        seen.add(tensor.name)
    placed = sorted(tensors, key=lambda tensor: tensor.begin)
    for tensor, after in pairwise(placed):
        if tensor.begin + tensor.size > after.begin:
            raise ValueError(f"the tensors {tensor.name} and {after.name} overlap")
    last = max(tensors, key=lambda tensor: tensor.begin + tensor.size, default=None)
    if last is not None and last.begin + last.size > length:
        cut = bool(_PART.search(path.stem))
        raise InputError(
            f"the GGUF file is truncated or damaged: {last.name} ends at byte {last.begin + last.size:,}, "
            f"the file has {length:,}",
            where=str(path),
            fix="if it is one piece of a file that was cut, join the pieces in order first"
            if cut
            else "download it again and compare its size with the publisher's",
        )

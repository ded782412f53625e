"""The tensors of a checkpoint by name: where they lie, their shapes, and reading one at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rk_export.errors import InputError
from rk_export.source.stand_ins import stand_in


class StoredTensors(Protocol):
    """Tensors of a checkpoint; what renames, merges or dequantizes them wraps another one."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor by name, from the files' headers."""

    @property
    def files(self) -> frozenset[Path]:
        """The files that the tensors are read from."""

    def place(self, name: str) -> str:
        """Return where a tensor lies, for messages."""

    def read(self, name: str) -> Tensor:
        """Read one tensor in its stored type.

        Raises:
            InputError: If its file is broken.
        """


# Types of the values of weights, as safetensors writes them.
FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
# Bytes that are read from a file before it is opened anew: what was read stays mapped while it is open.
_MAPPED = 1 << 29
_LONGEST_HEADER = 1 << 25  # bytes; of some 300,000 tensors


@dataclass(frozen=True)
class _Entry:
    """What a file's header says about a tensor: its file, shape, and type as safetensors names it (F32, U8 ...)."""

    path: Path
    shape: tuple[int, ...]
    type: str


class SafetensorFiles:
    """Every tensor of some safetensors files.

    Args:
        paths: The files.

    Raises:
        InputError: If a file is missing, truncated or no safetensors file, or two hold a tensor of one name.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        self._open = _OpenFile()
        for path in paths:
            for name, entry in _entries(path, self._open):
                if (other := self._entries.get(name)) is not None:
                    raise InputError(
                        f"tensor {name!r} lies in two files, {other.path.name} and {path.name}",
                        where=str(path.parent),
                        fix="leave one set of weights in the folder: move the other files away",
                    )
                self._entries[name] = entry

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self._entries.items()}

    @property
    def types(self) -> Mapping[str, str]:
        """Stored type of every tensor by name, as safetensors writes it: F32, BF16, I8 ..."""
        return {name: entry.type for name, entry in self._entries.items()}

    @property
    def files(self) -> frozenset[Path]:
        return frozenset(entry.path for entry in self._entries.values())

    def place(self, name: str) -> str:
        return str(self._entries[name].path)

    def read(self, name: str) -> Tensor:
        path = self._entries[name].path
        with _said(path):
            tensor: Tensor = self._open.at(path, name).get_tensor(name)
        self._open.note(tensor.nbytes)
        return tensor


class _OpenFile:
    """The file that was read last, which stays open for the next tensor: neighbours are read one after another.

    A tensor may be a view of the mapped file: it is given once, and a second time from the file opened anew, so that
    what is made of the first in place is not read again. Several threads may read.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._path: Path | None = None
        self._file: Any = None
        self._given: set[str] = set()
        self._mapped = 0

    def at(self, path: Path, name: str = "") -> Any:
        """Return an open file, from which the tensor of a name has not been read."""
        with self._lock:
            if self._path != path or (name and name in self._given) or self._mapped > _MAPPED:
                self._path = self._file = None
                self._file, self._path = safe_open(path, framework="pt"), path
                self._given, self._mapped = set(), 0
            self._given.add(name)
            return self._file

    def note(self, read: int) -> None:
        """Count the bytes that were read from it."""
        self._mapped += read


def _check_header(path: Path) -> None:
    """Refuse a header that is longer than its file, or than any in use, before it is read.

    safetensors checks the same with a bound of 100 MB, which takes 1.5 GB of memory. It also checks that the tensors
    fill the file without gap and overlap.
    """
    with path.open("rb") as handle:
        stated = int.from_bytes(handle.read(8), "little")
    held = path.stat().st_size - 8
    if stated > held:
        raise InputError(
            f"is truncated or not safetensors (it states a header of {stated:,} bytes and has {max(held, 0):,})",
            where=str(path),
            fix="download it again",
        )
    if stated > _LONGEST_HEADER:
        raise InputError(
            f"its header has {stated:,} bytes, at most {_LONGEST_HEADER:,} are read",
            where=str(path),
            fix="store the tensors in several files",
        )


def _entries(path: Path, opened: _OpenFile) -> Iterator[tuple[str, _Entry]]:
    with _said(path):
        if stand_in(path) is None:
            _check_header(path)
        file = opened.at(path)
        for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            header = file.get_slice(name)
            yield name, _Entry(path, tuple(header.get_shape()), str(header.get_dtype()))


@contextmanager
def _said(path: Path) -> Iterator[None]:
    """Say what is wrong with a file that cannot be read."""
    try:
        yield
    except FileNotFoundError as error:
        raise InputError(
            "is missing", where=str(path), fix="the checkpoint is incomplete: download it again"
        ) from error
    except (SafetensorError, OSError) as error:
        found = stand_in(path)
        raise InputError(
            f"is {found}" if found else f"is truncated or not safetensors ({error})",
            where=str(path),
            fix="download the file itself" if found else "download it again",
        ) from error

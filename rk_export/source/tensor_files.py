"""The tensors of a checkpoint by name: where they lie, their shapes, and reading one at a time."""

from __future__ import annotations

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
        for path in paths:
            for name, entry in _entries(path):
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
        with _open(self._entries[name].path) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def _entries(path: Path) -> Iterator[tuple[str, _Entry]]:
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            header = file.get_slice(name)
            yield name, _Entry(path, tuple(header.get_shape()), str(header.get_dtype()))


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
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

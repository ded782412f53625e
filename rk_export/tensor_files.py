"""The tensors of a checkpoint by name: where they lie, their shapes, and reading one at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from rk_export.errors import InputError

INDEX_FILE = "model.safetensors.index.json"


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


class SafetensorFiles:
    """Tensors in safetensors files.

    Args:
        files: File of each tensor by name.

    Raises:
        InputError: If a file is missing, truncated or no safetensors file, or lacks a tensor.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = dict(files)
        present = {path: dict(_shapes(path)) for path in self.files}
        for name, path in sorted(self._files.items()):
            if name not in present[path]:
                raise InputError(f"tensor {name!r} is missing", where=str(path), fix="download it again")
        self._shapes = {name: present[path][name] for name, path in self._files.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    @property
    def files(self) -> frozenset[Path]:
        return frozenset(self._files.values())

    def place(self, name: str) -> str:
        return str(self._files[name])

    def read(self, name: str) -> Tensor:
        with _open(self._files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_tensors(folder: Path) -> StoredTensors:
    """Find the safetensors files of a model folder.

    Raises:
        InputError: If there are none, or one is missing or broken.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return SafetensorFiles(_indexed(index))
    for path in (folder / "model.safetensors", *sorted(folder.glob("gptq_model-*bit*.safetensors"))[:1]):
        if path.is_file():
            return SafetensorFiles({name: path for name, _ in _shapes(path)})
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt") for file in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"only pickle weights ({pickles[0]}), which can run code when loaded and are never read",
            where=str(folder),
            fix="convert it once where you trust it: model.save_pretrained(folder) writes safetensors",
        )
    raise InputError("no model.safetensors", where=str(folder), fix="name a folder with safetensors weights")


def _indexed(index: Path) -> dict[str, Path]:
    try:
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {key: index.parent / name for key, name in names.items()}
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise InputError("is not a weight index", where=str(index), fix="download it again") from error


def _shapes(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    with _open(path) as file:
        for name in file.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
            yield name, tuple(file.get_slice(name).get_shape())


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise InputError(
            "is missing", where=str(path), fix="the checkpoint is incomplete: download it again"
        ) from error
    except SafetensorError as error:
        raise InputError(
            f"is truncated or not safetensors ({error})", where=str(path), fix="download it again"
        ) from error

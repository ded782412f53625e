"""Tensors that need not stay in memory: they are written to disk once and mapped from there.

Mapped pages belong to a file. The system drops them where memory is short and reads them again when they are used, so a
model of any depth takes no memory of the process for good. What is written again and again, such as an optimizer's
state, goes to its file as well. The files have no name once they are mapped: however the process ends, the disk gets
its space back.
"""

from __future__ import annotations

import errno
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from rk_export.device import CPU
from rk_export.folders import is_full
from rk_export.tensor_cache import cache_file, cache_root, read_tensors, write_tensors

# Bytes; smaller tensors stay in memory.
SMALLEST = 1 << 16
_ALIGNED = 64
_WRITTEN_TOGETHER = 1 << 24
_MAPS = Path("/proc/self/maps")


def mapped(tensors: Mapping[str, Tensor], folder: Path | None = None) -> dict[str, Tensor]:
    """Return copies of tensors that lie on disk, mapped; writing to one changes the process's own pages only.

    Args:
        tensors: On any device; the copies are on the CPU.
        folder: Whose disk takes them; the cache's when None.

    Raises:
        OSError: The disk is full, or nothing can be written there.
    """
    return _on_disk(tensors, folder, writable=False)


def writable(tensors: Mapping[str, Tensor], folder: Path | None = None) -> dict[str, Tensor]:
    """Return copies of tensors like `mapped`; what is written to one goes to its file, and takes no memory for good.

    Raises:
        OSError: As `mapped`.
    """
    return _on_disk(tensors, folder, writable=True)


def zeros(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    folder: Path | None = None,
) -> Tensor:
    """Return zeros to be written to: on the CPU like `writable`, on other devices in their memory."""
    if device.type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    with _file(folder) as (file, name):
        for begin in range(0, size, _WRITTEN_TOGETHER):
            file.write(bytes(min(_WRITTEN_TOGETHER, size - begin)))
        file.flush()
        storage = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
    return storage.view(dtype).view(*shape)


def joined(parts: Iterable[Tensor], length: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return vectors of `length` values in all, one after another, as `zeros` are; only one exists beside them."""
    whole, begin = None, 0
    for part in parts:
        if whole is None:
            whole = zeros([length], dtype, part.device)
        whole[begin : begin + len(part)] = part
        begin += len(part)
    return torch.empty(0, dtype=dtype) if whole is None else whole


def kept(
    kind: str,
    key: Mapping[str, Any],
    make: Callable[[], Mapping[str, Tensor]],
    cache_dir: str | os.PathLike[str] | None = None,
    *,
    keep: bool = True,
) -> Mapping[str, Tensor]:
    """Return what `rk_export.tensor_cache.cached` does, mapped: from the cache's file, or else as `mapped` does."""
    path = cache_file(kind, key, cache_dir)
    if (known := read_tensors(path)) is not None:
        return known
    made = make()
    if keep:
        write_tensors(path, made)
        known = read_tensors(path)
    return mapped(made) if known is None else known


def laid_down(tensor: Tensor, folder: Path | None = None, *, untouched: bool = False) -> Tensor:
    """Return a tensor, a large one on the CPU as a mapped copy; `untouched` as in `settle`."""
    if tensor.device.type != "cpu" or tensor.nbytes < SMALLEST:
        return tensor
    if untouched and _in_file(tensor.data_ptr()):
        return tensor
    return mapped({"": tensor}, folder)[""]


def _on_disk(tensors: Mapping[str, Tensor], folder: Path | None, *, writable: bool) -> dict[str, Tensor]:
    if not tensors:
        return {}
    places, size = {}, 0
    with _file(folder) as (file, name):
        for key, tensor in tensors.items():
            file.seek(size)
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            flat.view(torch.uint8).numpy().tofile(file)
            places[key] = size
            size += -(-flat.nbytes // _ALIGNED) * _ALIGNED
        file.truncate(size)
        file.flush()
        storage = torch.from_file(name, shared=writable, size=size, dtype=torch.uint8)
    return {
        key: storage[start : start + tensors[key].nbytes].view(tensors[key].dtype).view(tensors[key].shape)
        for key, start in places.items()
    }


@contextmanager
def _file(folder: Path | None) -> Iterator[tuple[BinaryIO, str]]:
    """Open a new file and give its name, which it loses in the end."""
    folder = folder or cache_root() / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".scratch-", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file, name
    except OSError as error:
        if is_full(error):  # NumPy names neither the reason nor the place
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    finally:
        os.unlink(name)


def settle(module: nn.Module, folder: Path | None = None, *, untouched: bool = False) -> None:
    """Move the large parameters and buffers of a module to disk, in place; what shares values goes on sharing them.

    Args:
        module: On the CPU; parameters on meta stay there.
        folder: As in `mapped`.
        untouched: Leave what lies in a file already; nothing was changed in it since it was mapped.
    """
    held: dict[str, list[Tensor]] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.nbytes >= SMALLEST:
            same = f"{tensor.data_ptr()} {tuple(tensor.shape)} {tensor.stride()}"
            held.setdefault(same, []).append(tensor)
    if untouched:
        files = _places_of_files()
        held = {same: group for same, group in held.items() if not _within(files, group[0].data_ptr())}
    copies = mapped({same: group[0].data for same, group in held.items()}, folder)
    for same, group in held.items():
        for tensor in group:
            tensor.data = copies[same]


@contextmanager
def settling(folder: Path | None = None) -> Iterator[None]:
    """Move every large parameter that a module is given inside this context to disk, unless it is in a file already.

    Args:
        folder: As in `mapped`.
    """
    register = nn.Module.register_parameter

    def settled(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            parameter.data = laid_down(parameter.data, folder, untouched=True)

    nn.Module.register_parameter = settled  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _in_file(address: int) -> bool:
    """Whether memory at an address is that of a file; where the system does not tell, it is not."""
    return _within(_places_of_files(), address)


def _within(places: Sequence[tuple[int, int]], address: int) -> bool:
    return any(begin <= address < end for begin, end in places)


def _places_of_files() -> list[tuple[int, int]]:
    """Return where files are mapped in this process, begin and end of each; nothing where the system does not tell."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    mappings = (line.split(maxsplit=5) for line in lines)
    spans = [span.split("-") for span, _, _, _, inode, *_ in mappings if inode != "0"]
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]

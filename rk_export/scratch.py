"""Tensors that need not stay in memory: they are written to disk once and mapped from there.

Mapped pages belong to a file. The system drops them where memory is short and reads them again when they are used, so a
model of any depth takes no memory of the process for good. The files have no name once they are mapped: however the
process ends, the disk gets its space back.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from rk_export.folders import is_full
from rk_export.tensor_cache import cache_root

# Bytes; smaller tensors stay in memory.
SMALLEST = 1 << 16
_ALIGNED = 64
_MAPS = Path("/proc/self/maps")


def mapped(tensors: Mapping[str, Tensor], folder: Path | None = None) -> dict[str, Tensor]:
    """Return copies of tensors that lie on disk, mapped; writing to one changes the process's own pages only.

    Args:
        tensors: On any device; the copies are on the CPU.
        folder: Whose disk takes them; the cache's when None.

    Raises:
        OSError: The disk is full, or nothing can be written there.
    """
    if not tensors:
        return {}
    folder = folder or cache_root() / "scratch"
    folder.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=".scratch-", dir=folder)
    try:
        places, size = {}, 0
        with os.fdopen(handle, "wb") as file:
            for key, tensor in tensors.items():
                file.seek(size)
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                flat.view(torch.uint8).numpy().tofile(file)
                places[key] = size
                size += -(-flat.nbytes // _ALIGNED) * _ALIGNED
            file.truncate(size)
        storage = torch.from_file(name, shared=False, size=size, dtype=torch.uint8)
    except OSError as error:
        if is_full(error):  # NumPy names neither the reason nor the place
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise
    finally:
        os.unlink(name)
    return {
        key: storage[start : start + tensors[key].nbytes].view(tensors[key].dtype).view(tensors[key].shape)
        for key, start in places.items()
    }


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
        held = {same: group for same, group in held.items() if not _in_file(group[0].data_ptr())}
    copies = mapped({same: group[0].data for same, group in held.items()}, folder)
    for same, group in held.items():
        for tensor in group:
            tensor.data = copies[same]


def _in_file(address: int) -> bool:
    """Whether memory at an address is that of a file; where the system does not tell, it is not."""
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        span, _, _, _, inode, *_ = line.split(maxsplit=5)
        begin, end = (int(bound, 16) for bound in span.split("-"))
        if begin <= address < end:
            return inode != "0"
    return False

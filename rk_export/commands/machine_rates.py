"""What this machine does in a second, found in about five: the prices of the amounts in `planning.resources`."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor, nn

from rk_export.calibration.moments import add_gram_matrix
from rk_export.device import CPU, matmul_dtype
from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.gptq import quantize_gptq
from rk_export.planning.cost_table import product_rate
from rk_export.planning.resources import KINDS, WorkKind
from rk_export.progress import stage

# Seconds that each rate is measured for, after one call that warms up.
_SECONDS = 0.3
# Columns, rows of many and of few: calls are short, so that some of them are not interrupted by other processes.
_SIZE, _MANY, _FEW = 768, 512, 32
_SWEPT = (2048, 96)  # rows and columns of a matrix that GPTQ rounds
_DISK = 1 << 26  # bytes of the file that is written and read
_BLOCK = QuantSpec(4, 32)

Rates = dict[WorkKind, float]


def machine_rates(folder: Path, device: torch.device = CPU, *, threads: int | None = None) -> Rates:
    """Measure how fast this machine is, a kind of work at a time.

    Args:
        folder: Where the disk is tried; a file of 67 MB is written there and removed.
        device: Where layers are multiplied and rounded.
        threads: Of ONNX Runtime; None lets it decide.

    Returns:
        Amounts a second by kind, as `StageNeeds.seconds` takes them.

    Raises:
        OSError: Nothing can be written in the folder.
    """
    measured: dict[WorkKind, Callable[[], float]] = {
        "products": lambda: _products(_MANY, matmul_dtype(device), device),
        "float_products": lambda: _products(_MANY, torch.float32, device),
        "thin_products": lambda: _products(_FEW, matmul_dtype(device), device),
        "int4_products": lambda: product_rate(_SIZE, _SIZE, _BLOCK, _FEW, seconds=_SECONDS, threads=threads),
        "grams": lambda: _grams(device),
        "factors": lambda: _factors(device),
        "passes": lambda: _passes(device),
        "calls": lambda: _calls(device),
        "writes": lambda: _writes(folder),
        "reads": lambda: _reads(folder),
        "checksums": _checksums,
    }
    found: Rates = {}
    with torch.inference_mode(), stage("trying this machine, kinds of work", len(KINDS)) as bar:
        for kind, measure in measured.items():
            found[kind] = measure()
            bar.advance()
        found["sweeps"] = _sweeps(found, device)
        bar.advance()
    return found


def _rate(amount: float, call: Callable[[], object], device: torch.device = CPU) -> float:
    """Return an amount over the time of the fastest call: what else runs here now is not what runs later."""
    call()
    fastest, end = math.inf, time.perf_counter() + _SECONDS
    while fastest == math.inf or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - begin)
    return amount / fastest


def _random(*shape: int, device: torch.device = CPU) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _products(rows: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return FLOPs a second as layers compute: a linear module, its weights converted on the way."""
    x, weight = _random(rows, _SIZE, device=device).to(dtype), _random(_SIZE, _SIZE, device=device).to(dtype)
    return _rate(2.0 * rows * _SIZE**2, lambda: nn.functional.linear(x, weight), device)


def _grams(device: torch.device) -> float:
    x = _random(_MANY, _SIZE, device=device)
    sums = torch.zeros(_SIZE, _SIZE, device=device)
    return _rate(float(_MANY * _SIZE * (_SIZE + 1)), lambda: add_gram_matrix(sums, x), device)


def _moment(columns: int, device: torch.device) -> Tensor:
    x = _random(2 * columns, columns, device=device)
    return x.T @ x / len(x)


def _factors(device: torch.device) -> float:
    second = _moment(_SIZE, device)
    return _rate(_SIZE**3 / 3, lambda: torch.linalg.cholesky_ex(second), device)


def _sweeps(known: Rates, device: torch.device) -> float:
    """Return entries that GPTQ rounds a second, its factor and its products left out."""
    rows, columns = _SWEPT
    W, second = _random(rows, columns, device=device), _moment(columns, device)
    calls = _rate(1.0, lambda: quantize_gptq(W, _BLOCK, second, scale_dtype=torch.float16), device)
    others = columns**3 / 3 / known["factors"] + 3.0 * rows * columns**2 / known["float_products"]
    # What is left of a small matrix is mostly this; at least a tenth is.
    return rows * columns / max(1 / calls - others, 0.1 / calls)


def _passes(device: torch.device) -> float:
    """Return bytes a second of an elementwise step on what no cache holds."""
    x = torch.zeros(1 << 24, device=device)
    return _rate(8.0 * x.numel(), lambda: x.add_(1.0), device)


def _calls(device: torch.device) -> float:
    x, count = torch.zeros(64, device=device), 1000

    def many() -> None:
        for _ in range(count):
            x.add_(1.0)

    return _rate(float(count), many, device)


def _writes(folder: Path) -> float:
    """Return bytes a second until a file is on the disk."""
    with _file(folder) as file:
        return _written(file)


def _reads(folder: Path) -> float:
    """Return bytes a second of a file that was just written, from the disk where the system lets go of its pages."""
    with _file(folder) as file:
        _written(file)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        begin = time.perf_counter()
        return len(file.read()) / (time.perf_counter() - begin)


def _file(folder: Path) -> IO[bytes]:
    """Return a file without a name on the disk that holds a folder, which need not exist yet."""
    while not folder.is_dir():
        folder = folder.parent
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def _written(file: IO[bytes]) -> float:
    block = np.random.default_rng(0).bytes(_DISK)  # noise: some file systems compress
    begin = time.perf_counter()
    file.write(block)
    os.fsync(file.fileno())
    return len(block) / (time.perf_counter() - begin)


def _checksums() -> float:
    block = bytes(1 << 22)
    return _rate(float(len(block)), lambda: hashlib.sha256(block).digest())

"""How many threads the CPU's operators run on, for a while, so that they are fast and give the same bytes everywhere.

Measured with 1, 2 and 4 threads of PyTorch 2.13 (MKL, oneDNN) and SciPy 1.17 (OpenBLAS) on an AMD EPYC: products of
matrices in any type, attention, and sums along rows or columns give the same bytes. Factorizations, solvers and
eigenproblems do not, and neither do sums over all entries, nor symmetric updates where OpenBLAS takes its kernels for
Haswell: their split, and so their rounding, follows the number of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Let PyTorch's CPU operators run on `count` threads inside the block.

    Loops over operators on some thousand entries want one: on two cores with other work, threads that waited for
    each other made such a loop 20 times slower.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let linear algebra of PyTorch, NumPy and SciPy run on one thread inside the block, for the same bytes."""
    with cpu_threads(1), _pools().limit(limits=1, user_api="blas"):
        yield


def total(values: Tensor) -> Tensor:
    """Return the sum of all entries in float64, the same on any number of threads."""
    with cpu_threads(1):
        return values.sum(dtype=torch.float64)


@functools.cache
def _pools() -> ThreadpoolController:
    """Return what limits the threads of the libraries that are loaded; to find them takes some milliseconds."""
    return ThreadpoolController()

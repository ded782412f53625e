"""How many threads PyTorch's CPU operators run on, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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

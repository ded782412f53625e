"""Second moments summed over tokens, and the hooks that see what matrices read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rk_export.passes.numerics.curvature import Inputs
from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.threads import one_thread

_PANEL = 512  # rows of a sum that one thread adds to
_TILE = 1024  # rows of a matrix that are mirrored at a time


class MomentSum:
    """Sum over tokens of x xᵀ, or of its diagonal, in float32.

    Args:
        diagonal: Keep the diagonal only.
    """

    def __init__(self, *, diagonal: bool = False) -> None:
        self.tokens = 0
        self._diagonal = diagonal
        self._sum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add tokens (..., n)."""
        flat = x.detach().flatten(0, -2).float()
        size = flat.shape[1]
        if self._sum is None:
            self._sum = flat.new_zeros(size if self._diagonal else (size, size))
        if self._diagonal:
            self._sum += flat.square().sum(0)
        else:
            add_gram_matrix(self._sum, flat)
        self.tokens += len(flat)

    def total(self) -> Tensor:
        """Return the sum, (n, n) or (n,), on the CPU.

        Raises:
            ValueError: If no token came.
        """
        if self._sum is None:
            raise ValueError("no token was added")
        if not self._diagonal:
            _mirror(self._sum)
        return self._sum.cpu()

    def mean(self) -> Tensor:
        """Return the mean over tokens, as `total` does."""
        return self.total() / self.tokens


def _mirror(total: Tensor) -> None:
    """Copy the upper triangle of a matrix (n, n) below its diagonal, in place: it may take half a gigabyte."""
    for begin in range(0, len(total), _TILE):
        rows = slice(begin, begin + _TILE)
        tile = total[rows, rows]
        tile.copy_(tile.triu() + tile.triu(1).T)
        total[begin + _TILE :, rows] = total[rows, begin + _TILE :].T


def add_gram_matrix(total: Tensor, flat: Tensor) -> None:
    """Add xᵀx to the upper triangle of a sum, in place; blocks of the diagonal come whole.

    On the CPU panels of a fixed width are computed side by side, each on one thread: how BLAS splits a symmetric update
    among threads changes its last bits on some processors.
    """
    if total.device.type != "cpu":
        total.addmm_(flat.T, flat)
        return
    threads, sums, rows = torch.get_num_threads(), total.numpy(), flat.contiguous().numpy()

    def add_panel(begin: int) -> None:
        end = begin + _PANEL
        sums[begin:end, begin:] += rows[:, begin:end].T @ rows[:, begin:]

    with one_thread(), ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(add_panel, range(0, len(sums), _PANEL)):
            pass


class InputSum:
    """Sums of x xᵀ and x₀ xᵀ, x a token's input in one version of the model and x₀ in another."""

    def __init__(self) -> None:
        self._second = MomentSum()
        self._cross: Tensor | None = None

    def add(self, x: Tensor, other: Tensor | None) -> None:
        """Add tokens (..., n); `other` holds the same tokens in the other version, None where the two agree."""
        self._second.add(x)
        if other is not None:
            flat, flat_other = (item.flatten(0, -2).float() for item in (x, other))
            part = product(flat_other.T, flat)
            self._cross = part if self._cross is None else self._cross.add_(part)

    def moments(self) -> Inputs:
        """Return the means over tokens, on the CPU.

        Raises:
            ValueError: If no token came.
        """
        second = self._second.mean()
        cross = None if self._cross is None else self._cross.cpu() / self._second.tokens
        return Inputs(second, cross, tokens=self._second.tokens)


@contextmanager
def recorded_inputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collect what modules read while a layer runs: name -> (..., in), in the order of the calls."""
    seen: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def note(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0]

        return module.register_forward_pre_hook(note)

    handles = [watch(name, module) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def readers(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Return for each name the first one that read the very same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(x), name) for name, x in inputs.items()}


def common_reader(names: Sequence[str], reader_of: Mapping[str, str]) -> str | None:
    """Return the reader that stands for all names, or None where they read different tensors or none."""
    found = {reader_of.get(name) for name in names}
    return found.pop() if len(found) == 1 else None

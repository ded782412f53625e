"""What is recorded about the matrices of a whole model while text runs through it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rk_export.calibration.moments import MomentSum
from rk_export.matrix_id import MatrixId
from rk_export.passes.numerics.threads import total

Recorder = Callable[[MatrixId, Tensor, Tensor], None]


class InputRecorder:
    """Moments and peaks of what matrices read, kept once for matrices that read the same."""

    def __init__(self) -> None:
        self._sums: defaultdict[MatrixId, MomentSum] = defaultdict(MomentSum)
        self._peaks: dict[MatrixId, Tensor] = {}
        self._squares: defaultdict[MatrixId, float] = defaultdict(float)
        self._reader: dict[MatrixId, MatrixId] = {}
        self._last: tuple[Tensor, MatrixId] | None = None

    def record(self, place: MatrixId, x: Tensor, output: Tensor) -> None:
        """Add an input (..., in), unless the matrix that ran before read it too."""
        if self._last is None or self._last[0] is not x:
            self._last = x, place
            self._sums[place].add(x)
            sizes = x.detach().flatten(0, -2).float().abs()
            peaks = sizes.amax(0).cpu()
            self._peaks[place] = torch.maximum(self._peaks.get(place, peaks), peaks)
            self._squares[place] += float(total(sizes.amax(1).square()))
        self._reader[place] = self._last[1]

    def second(self) -> dict[MatrixId, Tensor]:
        """Return the mean over tokens of x xᵀ by matrix, (in, in)."""
        means = {place: item.mean() for place, item in self._sums.items()}
        return {place: means[reader] for place, reader in self._reader.items()}

    def peaks(self) -> dict[MatrixId, Tensor]:
        """Return the largest magnitude of each feature by matrix, (in,)."""
        return {place: self._peaks[reader] for place, reader in self._reader.items()}

    def token_peaks(self) -> dict[MatrixId, float]:
        """Return the mean over tokens of the squared largest magnitude by matrix."""
        means = {place: total / self._sums[place].tokens for place, total in self._squares.items()}
        return {place: means[reader] for place, reader in self._reader.items()}

    def reads(self) -> dict[MatrixId, int]:
        """Return how many tokens each matrix read."""
        return {place: self._sums[reader].tokens for place, reader in self._reader.items()}


class GradientRecorder:
    """Moments of the gradients by what matrices put out.

    Args:
        diagonal: Keep the diagonals only.
    """

    def __init__(self, *, diagonal: bool) -> None:
        self._sums: defaultdict[MatrixId, MomentSum] = defaultdict(lambda: MomentSum(diagonal=diagonal))

    def record(self, place: MatrixId, x: Tensor, output: Tensor) -> None:
        """Add the gradient by an output (..., out) once it flows back."""
        output.register_hook(self._sums[place].add)  # type: ignore[no-untyped-call]

    def moments(self, predicted: int) -> dict[MatrixId, Tensor]:
        """Return the sum over tokens of g gᵀ, (out, out) or (out,), g the gradient of the mean over `predicted` tokens.

        The gradients that were recorded are of the sum over those tokens.
        """
        return {place: item.total() / predicted**2 for place, item in self._sums.items()}


@contextmanager
def recording(modules: Mapping[MatrixId, nn.Module], *recorders: Recorder) -> Iterator[None]:
    """Let recorders see the inputs and outputs of matrices whenever they run."""

    def watch(place: MatrixId) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def call(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            for record in recorders:
                record(place, arguments[0], output)

        return call

    handles = [module.register_forward_hook(watch(place)) for place, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

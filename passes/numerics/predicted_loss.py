"""What an approximation of one matrix costs, predicted before it is made: nats per token, to second order.

With C the second moment of a matrix's inputs and G that of the loss' gradients by its outputs, replacing W by
W + E raises the mean loss by about tr(G E C Eᵀ) / 2: the Kronecker-factored Fisher information (1503.05671).
In this one unit a singular direction here is comparable with a bit there, which is what a budget needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rk_export.options.quantization import QuantSpec
from rk_export.passes.numerics.curvature import Curvature
from rk_export.passes.numerics.eigen import product
from rk_export.passes.numerics.joint_svd import whitened_singular_values

# The mean square of a rounding error that is uniform over a step of the grid.
_UNIFORM = 1 / 12
_INT8_LEVELS = 127


def rank_losses(W: Tensor, curvature: Curvature) -> Tensor:
    """Return the predicted loss of the best rank-k approximation for k = 0 ... min(out, in), float64."""
    energy = whitened_singular_values(W, curvature.inputs.metric, curvature.output_metric).square()
    tails = energy.flip(0).cumsum(0).flip(0)
    return 0.5 * torch.cat([tails, tails.new_zeros(1)])


def rounding_loss(W: Tensor, spec: QuantSpec, curvature: Curvature, columns: Tensor) -> float:
    """Return the predicted loss of quantizing W (out, in) to a spec, see `rounding_losses`.

    Args:
        W: The matrix.
        spec: Bits, block size, symmetry and activations.
        curvature: Of the matrix.
        columns: Cost of a unit of squared error in each column, see `Inputs.column_weights`.
    """
    return rounding_losses(W, {spec: columns}, curvature)[spec]


def rounding_losses(
    W: Tensor, columns: Mapping[QuantSpec, Tensor], curvature: Curvature
) -> dict[QuantSpec, float]:
    """Return the predicted loss of quantizing W (out, in) to each of several specs; W is read once.

    Rounding errors are taken as independent and uniform over a step, which is right for many bits and
    pessimistic for two.

    Args:
        W: The matrix.
        columns: By spec, cost of a unit of squared error in each column, see `Inputs.column_weights`.
        curvature: Of the matrix.
    """
    out_weights = curvature.output_weights.to(torch.float32)
    ranges = _ranges(W, columns)
    losses = {}
    for spec, weights in columns.items():
        by_block = _blocks(weights.to(torch.float32)[None], spec.block_size).sum(-1)[0]
        rows = product(ranges[spec.block_size].squared_steps(spec), by_block[:, None])[:, 0]
        losses[spec] = 0.5 * _UNIFORM * float(out_weights @ rows)
        if spec.activations == 8:
            norms = W.to(torch.float32).square().sum(1)
            peak = curvature.inputs.token_peak / _INT8_LEVELS**2
            losses[spec] += 0.5 * _UNIFORM * peak * float(out_weights @ norms)
    return losses


def block_peaks(x: Tensor, block_size: int) -> Tensor:
    """Return the mean over tokens of the squared largest input of each block (blocks,), for inputs (tokens, in)."""
    return _blocks(x.to(torch.float32), block_size).abs().amax(-1).square().mean(0)


def input_rounding_loss(W: Tensor, block_size: int, peaks: Tensor, out_weights: Tensor) -> float:
    """Return the predicted loss of rounding what W (out, in) reads to int8, block by block.

    That is what MatMulNBits does at accuracy level 4: the step of a block is its largest input over 127.

    Args:
        W: The matrix.
        block_size: Inputs of a block.
        peaks: Of `block_peaks`.
        out_weights: Mean square of the loss' gradient by the outputs (out,).
    """
    energy = _blocks(W.to(torch.float32).square(), block_size).sum(-1)
    rows = product(energy, peaks.to(energy)[:, None])[:, 0]
    return 0.5 * _UNIFORM / _INT8_LEVELS**2 * float(out_weights.to(rows) @ rows)


@dataclass(frozen=True)
class TableCurvature:
    """The curvatures of one stored table (vocabulary, dim), which is read in two ways.

    Args:
        head: As the output projection: what it reads, and the mean over tokens of p (1 - p), p the probability of
            each token (vocabulary,); zeros where the table is no output projection.
        lookup: As the embedding, which multiplies one-hot tokens from the other side: the share of each token in the
            text (vocabulary,) as the diagonal of its inputs' moment, zeros where the table is no embedding; and the
            mean square of the loss' gradient by its output (dim,).
    """

    head: Curvature
    lookup: Curvature


def table_losses(
    table: Tensor, specs: Sequence[QuantSpec], curvature: TableCurvature, columns: Tensor
) -> dict[QuantSpec, float]:
    """Return the predicted loss of quantizing a table (vocabulary, dim) to each of several specs.

    It is the loss as output projection and that as embedding together.

    Args:
        table: The table.
        specs: Blockwise specs.
        curvature: Of the table.
        columns: Cost of a unit of squared error in each column of the output projection (dim,).
    """
    ranges = _ranges(table, specs)
    head, lookup = curvature.head, curvature.lookup
    losses = {}
    for spec in specs:
        steps = ranges[spec.block_size].squared_steps(spec)
        total = 0.0
        read_in = (head.output_weights, columns), (lookup.inputs.alone, lookup.output_weights)
        for rows, weights in read_in:
            by_block = _blocks(weights.to(torch.float32)[None], spec.block_size).sum(-1)[0]
            total += float(rows.to(torch.float32) @ (steps @ by_block))
        losses[spec] = 0.5 * _UNIFORM * total
    return losses


def _blocks(W: Tensor, block_size: int) -> Tensor:
    """Return W (N, K) cut to (N, blocks, block), zeros at the end; block size 0 is the whole row."""
    block = block_size or W.shape[1]
    padded: Tensor = torch.nn.functional.pad(W, (0, -W.shape[1] % block))
    cut: Tensor = padded.view(W.shape[0], -1, block)
    return cut


@dataclass(frozen=True)
class _Range:
    """The largest and the least entry of each block of a matrix (N, blocks), zeros that fill the last one included."""

    high: Tensor
    low: Tensor

    def coarser(self, times: int) -> _Range:
        """Return the range of blocks that hold so many of these; 0 is one block a row."""
        return _Range(_blocks(self.high, times).amax(-1), _blocks(self.low, times).amin(-1))

    def squared_steps(self, spec: QuantSpec) -> Tensor:
        """Return the squared step of each block's grid (N, blocks), float32."""
        if not spec.symmetric:
            steps: Tensor = (self.high.clamp_min(0) - self.low.clamp_max(0)) / (2**spec.bits - 1)
        else:
            levels = _INT8_LEVELS if spec.activations == 8 else 2 ** (spec.bits - 1)
            steps = torch.maximum(self.high, -self.low) / levels
        return steps.square()


def _ranges(W: Tensor, specs: Iterable[QuantSpec]) -> dict[int, _Range]:
    """Return the ranges of W's blocks by block size; those of coarse blocks come from those of the finest."""
    sizes = {spec.block_size for spec in specs}
    finest = min(sizes - {0}, default=0)
    low, high = torch.aminmax(_blocks(W.to(torch.float32), finest), dim=-1)
    whole = _Range(high, low)
    return {size: whole if size == finest else whole.coarser(size // finest) for size in sizes}

"""What an approximation of one matrix costs, predicted before it is made: nats per token, to second order.

With C the second moment of a matrix's inputs and G that of the loss' gradients by its outputs, replacing W by
W + E raises the mean loss by about tr(G E C Eᵀ) / 2: the Kronecker-factored Fisher information (1503.05671).
In this one unit a singular direction here is comparable with a bit there, which is what a budget needs.
"""

from __future__ import annotations

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
    """Return the predicted loss of quantizing W (out, in) to a spec.

    Rounding errors are taken as independent and uniform over a step, which is right for many bits and
    pessimistic for two.

    Args:
        W: The matrix.
        spec: Bits, block size, symmetry and activations.
        curvature: Of the matrix.
        columns: Cost of a unit of squared error in each column, see `Inputs.column_weights`.
    """
    out_weights = curvature.output_weights.to(torch.float32)
    by_block = _blocks(columns.to(torch.float32)[None], spec.block_size).sum(-1)[0]
    rows = product(_squared_steps(W, spec), by_block[:, None])[:, 0]
    loss = 0.5 * _UNIFORM * float(out_weights @ rows)
    if spec.activations == 8:
        norms = W.to(torch.float32).square().sum(1)
        loss += 0.5 * _UNIFORM * curvature.inputs.token_peak / _INT8_LEVELS**2 * float(out_weights @ norms)
    return loss


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


def table_loss(table: Tensor, spec: QuantSpec, curvature: TableCurvature, columns: Tensor) -> float:
    """Return the predicted loss of quantizing a table (vocabulary, dim), as output projection and as embedding.

    Args:
        table: The table.
        spec: A blockwise spec.
        curvature: Of the table.
        columns: Cost of a unit of squared error in each column of the output projection (dim,).
    """
    steps = _squared_steps(table, spec)

    def weighed(rows: Tensor, weights: Tensor) -> float:
        by_block = _blocks(weights.to(torch.float32)[None], spec.block_size).sum(-1)[0]
        return float(rows.to(torch.float32) @ (steps @ by_block))

    head, lookup = curvature.head, curvature.lookup
    as_head = weighed(head.output_weights, columns)
    return 0.5 * _UNIFORM * (as_head + weighed(lookup.inputs.alone, lookup.output_weights))


def _blocks(W: Tensor, block_size: int) -> Tensor:
    """Return W (N, K) cut to (N, blocks, block), zeros at the end; block size 0 is the whole row."""
    block = block_size or W.shape[1]
    padded: Tensor = torch.nn.functional.pad(W, (0, -W.shape[1] % block))
    cut: Tensor = padded.view(W.shape[0], -1, block)
    return cut


def _squared_steps(W: Tensor, spec: QuantSpec) -> Tensor:
    """Return the squared step of each block's grid (N, blocks), float32."""
    cut = _blocks(W.to(torch.float32), spec.block_size)
    high, low = cut.amax(-1), cut.amin(-1)
    if not spec.symmetric:
        steps: Tensor = (high.clamp_min(0) - low.clamp_max(0)) / (2**spec.bits - 1)
    else:
        levels = _INT8_LEVELS if spec.activations == 8 else 2 ** (spec.bits - 1)
        steps = torch.maximum(high, -low) / levels
    return steps.square()

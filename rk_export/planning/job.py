"""What a run is to do, in the numbers that decide what it takes: shapes, tokens, and which steps there are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Literal

from rk_export.model.description import ModelDescription
from rk_export.model.matrices import Matrix
from rk_export.options.recipe import Recipe

Writer = Literal["dense", "int4", "nobody"]
Shape = tuple[int, int]

_FLOAT, _DOUBLE, _LONG = 4, 8, 8


@dataclass(frozen=True)
class LayerCounts:
    """One layer in numbers.

    Args:
        parameters: All of them.
        matrices: (out, in) of its rewritable matrices.
        reads: Width of each tensor that matrices read, once for matrices that read the same one.
        experts: How many experts it has; 0 for an ordinary feed-forward block.
        active: Share of a token's matrices that it runs through: 1 without experts.
    """

    parameters: int
    matrices: tuple[Shape, ...]
    reads: tuple[int, ...]
    experts: int = 0
    active: float = 1.0

    @property
    def entries(self) -> int:
        """Entries of the rewritable matrices."""
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def input_bytes(self) -> int:
        """Statistics of what the matrices read: moments and peaks, and two numbers for each matrix."""
        numbers = (_DOUBLE + _LONG) * len(self.matrices)
        return sum(_FLOAT * (width**2 + width) for width in self.reads) + numbers

    def gradient_bytes(self, *, diagonal: bool) -> int:
        """Statistics of the gradients by what they put out."""
        return sum(_FLOAT * (rows if diagonal else rows**2) for rows, _ in self.matrices)


@dataclass(frozen=True)
class Job:
    """A compression as numbers.

    Args:
        description: Of the dense model.
        recipe: What was asked for.
        parameters: Of the model as it is stored, tied weights once.
        stored_bytes: Of its files.
        is_mapped: The files hold the tensors as they are used, in float32: they are mapped and never copied.
        length: Tokens of a sequence of the calibration text.
        sequences: How many there are; 0 without a text.
        writer: Who writes the text.
        has_statistics: Moments are taken on the text.
        directions: Whole second moments of the gradients are taken, and not just their diagonals.
        back: Tokens that run back.
        prepares: The best reparameterizations are looked for.
        int4_bytes: Of the files of the model in plain INT4.
        output_bytes: Of the bundle's model files.
        limit: Bytes of statistics that the cache takes.
        product_bytes: Of a number in the type that the device multiplies in.
        tokenizer_bytes: Of the tokenizer's file.
        on_gpu: Layers, moments and GPTQ are on a CUDA device.
    """

    description: ModelDescription
    recipe: Recipe
    parameters: int
    stored_bytes: int
    is_mapped: bool
    length: int
    sequences: int
    writer: Writer
    has_statistics: bool
    directions: bool
    back: int
    prepares: bool
    int4_bytes: int
    output_bytes: int
    limit: int
    product_bytes: int
    tokenizer_bytes: int = 0
    on_gpu: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the calibration text."""
        return self.length * self.sequences

    @property
    def width(self) -> int:
        """Of the residual stream."""
        return int(self.description.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.description.config.vocab_size)

    @property
    def table(self) -> int:
        """Entries of the token embedding."""
        rows, columns = self.description.table_shape
        return rows * columns

    @property
    def tables(self) -> int:
        """Entries of the embedding, and of an output projection of its own."""
        return self.table * self.description.table_count

    @cached_property
    def layers(self) -> tuple[LayerCounts, ...]:
        """Every layer in numbers."""
        by_layer = groupby(self.description.matrices, lambda matrix: matrix.id.layer)
        matrices = {index: list(items) for index, items in by_layer}
        config = self.description.config
        taken = int(getattr(config, "num_experts_per_tok", None) or 1)
        return tuple(
            _counts(sum(one.numel() for one in layer.module.parameters()), matrices[layer.index], taken)
            for layer in self.description.layers()
        )

    @cached_property
    def largest(self) -> LayerCounts:
        """The layer with the most parameters."""
        return max(self.layers, key=lambda layer: layer.parameters)

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of all layers."""
        return sum(layer.parameters for layer in self.layers)

    @cached_property
    def active_parameters(self) -> float:
        """Parameters of all layers that one token runs through."""
        return sum(layer.parameters * layer.active for layer in self.layers)

    @property
    def statistics_bytes(self) -> int:
        """What is kept of the statistics, experts that no token reaches included."""
        if not self.has_statistics:
            return 0
        inputs = sum(layer.input_bytes for layer in self.layers)
        gradients = sum(layer.gradient_bytes(diagonal=not self.directions) for layer in self.layers)
        rest = _LONG + (_FLOAT * self.width if self.back else 0)
        return inputs + (gradients if self.back else 0) + rest

    @property
    def cache_row(self) -> int:
        """Keys and values of one token in all layers that have them, in numbers."""
        heads, layers = self.description.heads, self.description.decoder.attention_layers
        return 2 * len(layers) * heads.kv_heads * heads.head_dim


def _counts(parameters: int, matrices: Sequence[Matrix], taken: int) -> LayerCounts:
    shapes = tuple(matrix.shape for matrix in matrices)
    of_experts = [matrix for matrix in matrices if matrix.role == "expert"]
    experts = len({expert_of(matrix) for matrix in of_experts})
    idle = sum(rows * columns for rows, columns in (matrix.shape for matrix in of_experts))
    active = 1 - idle * (1 - min(1.0, taken / experts)) / parameters if experts else 1.0
    return LayerCounts(parameters, shapes, tuple(_reads(matrices)), experts, active)


def _reads(matrices: Sequence[Matrix]) -> Iterator[int]:
    """Yield the width of each tensor that matrices read one after another."""
    for _, group in groupby(matrices, _reader):
        yield next(group).shape[1]


def _reader(matrix: Matrix) -> str:
    """Return what is the same for matrices that read one tensor."""
    path, _, name = matrix.id.path.rpartition(".")
    if matrix.role == "expert":
        return f"{path} {'down' if name.startswith('down') else 'in'}"
    return {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}.get(
        matrix.role, matrix.role
    )


def expert_of(matrix: Matrix) -> str:
    """Return the path of the expert that a matrix is of."""
    return matrix.id.path.rpartition(".")[0]

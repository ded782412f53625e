"""Which mixtures one `com.microsoft.QMoE` node computes exactly: only the chosen experts of a token are run.

Facts of onnxruntime 1.31 on a CPU, found by trying and in its schema:

- experts of 4 bits compute what MatMulNBits computes, with float inputs and with int8 inputs (level 4);
- experts of 8 bits always read int8 inputs, as MatMulNBits does at level 4;
- experts of 2 bits go through tables that round otherwise than MatMulNBits;
- gated experts are computed for SiLU alone; blocks must fill the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from rk_export.model.canonical import ExpertMLP, Experts
from rk_export.options.quantization import QuantSpec
from rk_export.options.recipe import Recipe
from rk_export.passes.modules.quantized import QuantizedLinear

GROUPED_BITS = (4, 8)
# Blocks up to which a row is computed alike alone and among others, by bits, where inputs are rounded to int8.
_ALIKE_BLOCKS = {4: 32, 8: 64}


def why_not_grouped(experts: Experts, activation: str, recipe: Recipe) -> str:
    """Return why one node cannot compute the experts of a layer exactly, or an empty string.

    Args:
        experts: As the weights are stored.
        activation: Name of their activation.
        recipe: With the accuracy level and the machine of the graph.
    """
    matrices = list(matrices_of(experts))
    stored = [matrix for matrix in matrices if isinstance(matrix, QuantizedLinear)]
    if len(stored) < len(matrices):
        return "not all of its experts are plain INT4 or INT8 matrices"
    specs = {matrix.spec for matrix in stored}
    if len(specs) > 1:
        return "its experts have several formats"
    if any(matrix.bias is not None for matrix in stored):
        return "its experts have biases"
    if activation != "silu":
        return f"the operator computes gated experts for SiLU, not for {activation}"
    if len({matrix.reads_floats for matrix in stored}) > 1:
        return "its experts read their inputs at several accuracy levels"
    (spec,) = specs
    widths = {matrix.in_features for matrix in stored}
    return _why_not_format(spec, widths) or _why_not_level(spec, stored[0].reads_floats, recipe)


def _why_not_format(spec: QuantSpec, widths: Iterable[int]) -> str:
    if spec.bits not in GROUPED_BITS:
        return f"the operator rounds {spec.bits}-bit experts otherwise"
    for width in sorted(widths):
        if width % spec.block_size:
            return f"blocks of {spec.block_size} columns do not fill the {width} columns of its experts"
        if not spec.symmetric and width == spec.block_size:
            return "zero points of one block a row are laid out otherwise"
    return ""


def _why_not_level(spec: QuantSpec, reads_floats: bool, recipe: Recipe) -> str:
    target = recipe.target
    if spec.bits == 8 and target.ep == "cpu" and (reads_floats or target.accuracy_level != 4):
        return "the operator rounds the inputs of 8-bit experts to int8, and they are to be read in floats"
    return ""


def needs_company(spec: QuantSpec, level: int) -> bool:
    """Whether the CPU computes a row that is alone with an expert otherwise than one of several.

    Several rows go through the kernels in pairs, so a row that comes twice is never alone.

    Args:
        spec: Of the experts.
        level: Accuracy level of the node.
    """
    rounds_inputs = spec.bits == 8 or level == 4
    return not rounds_inputs or spec.block_size > _ALIKE_BLOCKS[spec.bits]


def matrices_of(experts: Experts) -> Iterator[nn.Module]:
    """Yield gate, up and down of every expert."""
    for expert in experts:
        assert isinstance(expert, ExpertMLP)  # `split_experts` made them
        yield from (expert.gate_proj, expert.up_proj, expert.down_proj)

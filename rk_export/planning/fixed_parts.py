"""What a bundle's model files hold beside the matrices that a plan decides on, from shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from rk_export.model.context import context_of
from rk_export.model.description import ModelDescription
from rk_export.model.exported_names import rename_tensors
from rk_export.model.preparable import has_rotated_head
from rk_export.options.quantization import QuantSpec
from rk_export.options.recipe import Recipe
from rk_export.planning.stored_bytes import FLOAT_BYTES, matrix_bytes
from rk_export.report.humanize import size
from rk_export.report.records import Finding, Outcome

# model.onnx holds nodes, names and shapes: 8.5 to 10.7 kB a layer on SmolLM2; these reserve a little more.
GRAPH_BYTES, GRAPH_BYTES_PER_LAYER = 100_000, 12_000


@dataclass(frozen=True)
class FixedPart:
    """One kind of what is stored whatever the plan says.

    Args:
        name: What it is.
        parameters: Of the dense model.
        bytes: In the exported files; those of the graph itself are an upper estimate.
        why: Why nothing is saved here.
    """

    name: str
    parameters: int
    bytes: int
    why: str = "stays in floats"


def fixed_parts(description: ModelDescription, recipe: Recipe) -> tuple[FixedPart, ...]:
    """Return the parts of a bundle beside the decided matrices, those that are absent left out."""
    config, float_bytes = description.config, FLOAT_BYTES[recipe.target.float_dtype]
    parts = [
        FixedPart(kind, count, count * float_bytes)
        for kind, count in _undecided_parameters(description).items()
    ]
    if (rotary := _rotary(description, recipe)) is not None:
        parts.append(rotary)
    if has_rotated_head(description, recipe.preparations):
        rotation = matrix_bytes(config.hidden_size, config.hidden_size, QuantSpec(8, 32), 4)
        parts.append(FixedPart("rotation of the head", 0, rotation, "a preparation puts it there"))
    return (*parts, FixedPart("graph", 0, graph_bytes(description), "nodes and names"))


def graph_bytes(description: ModelDescription) -> int:
    """Return an upper estimate of the graph without weights."""
    return int(GRAPH_BYTES + GRAPH_BYTES_PER_LAYER * description.layer_count)


def fixed_findings(description: ModelDescription, recipe: Recipe) -> list[Finding]:
    """Return a line for each fixed part that holds numbers of the model."""
    return [
        Finding(part.name, Outcome.SKIPPED, part.why, part.parameters * 4, part.bytes)
        for part in fixed_parts(description, recipe)
        if part.parameters or part.name == _ROTARY
    ]


def fixed_bytes(description: ModelDescription, recipe: Recipe) -> float:
    """Return the bytes of all fixed parts; a little too many."""
    return float(sum(part.bytes for part in fixed_parts(description, recipe)))


def in_words(parts: Sequence[FixedPart]) -> str:
    """Return ``norms 4.6 kB, graph 124 kB``."""
    return ", ".join(f"{part.name} {size(part.bytes)}" for part in parts)


_ROTARY = "rotary frequencies"


def _undecided_parameters(description: ModelDescription) -> dict[str, int]:
    """Return kind -> parameters of what is no decided matrix."""
    architecture = description.architecture
    decided = {f"{matrix.torch_path}.weight" for matrix in description.matrices}
    decided |= {f"{path}.weight" for path in (architecture.embedding, architecture.lm_head) if path}
    counts: dict[str, int] = {}
    stored = description.canonical.state_dict().keys()
    for module_name, module in description.canonical.named_modules():
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        for name, parameter in tensors:
            path = f"{module_name}.{name}"
            if path in decided or path not in stored:
                continue
            # What the exported model lacks is left out, whole modules and rows of tables.
            exported = rename_tensors(architecture, {path: parameter.detach()}, tied=False)
            for tensor in exported.values():
                kind = _kind(module, name)
                counts[kind] = counts.get(kind, 0) + tensor.numel()
    return counts


def _kind(module: nn.Module, name: str) -> str:
    if "norm" in type(module).__name__.lower():
        return "norms"
    if isinstance(module, nn.Embedding):
        return "embeddings of positions"
    if isinstance(module, nn.Conv1d) and name == "weight":
        return "short convolutions"
    if isinstance(module, nn.Linear) and name == "weight":
        return "matrices around the layers"
    if "activation" in type(module).__name__.lower():
        return "activations"
    return "biases" if name.endswith("bias") else "routers"


def _rotary(description: ModelDescription, recipe: Recipe) -> FixedPart | None:
    """Return the frequencies, and what the tables take in memory; None for a model that rotates nothing."""
    positions = context_of(description.config, recipe.target.context_length)
    tables = description.rotary_tables(positions).values()
    if not tables:
        return None
    stored = sum(4 * len(part.frequencies) + 8 for table in tables for part in table.parts)
    memory = sum(table.computed_bytes(FLOAT_BYTES[recipe.target.float_dtype]) for table in tables)
    return FixedPart(
        _ROTARY, 0, stored, f"the tables of {positions:,} positions, {size(memory)}, are computed on loading"
    )

"""What a model weighs, before work from its plan and afterwards from its tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from rk_export.options.recipe import Recipe
from rk_export.passes.base import Layer
from rk_export.passes.modules.quantized import Int8Linear, QuantizedEmbedding, QuantizedLinear
from rk_export.passes.modules.sparse import SparseSum
from rk_export.passes.weights.shapes import planned_shape
from rk_export.passes.weights.sparse import ENTRY_BYTES
from rk_export.plan import Plan, SitePlan
from rk_export.planning.fixed_parts import fixed_bytes, fixed_findings, graph_bytes
from rk_export.planning.planner import decide_plan
from rk_export.planning.stored_bytes import FLOAT_BYTES, matrix_bytes, stored_shapes
from rk_export.report.records import Finding, Outcome, SizeSummary
from rk_export.rewrite.apply import Rewritten
from rk_export.source.protocol import Source


def planned_findings(source: Source, plan: Plan) -> list[Finding]:
    """Return what a plan would do to each site, to the embedding and to the head, from shapes alone."""
    findings = []
    for dense in source.description.layers():
        layer, removed = planned_shape(dense, plan.shape_of(dense.index), plan.of_layer(dense.index))
        findings += removed
        findings += [
            _planned(layer, site, plan.recipe.target.float_dtype) for site in plan.of_layer(layer.index)
        ]
    findings += [_planned_table(path, source, plan) for path in _tables(source)]
    return findings


def planned_bytes(source: Source, plan: Plan) -> int:
    """Return the bytes that a plan leaves, graph and configs left out."""
    fixed = fixed_findings(source.description, plan.recipe)
    return sum(finding.bytes_after for finding in (*planned_findings(source, plan), *fixed))


def least_bytes(source: Source, recipe: Recipe) -> int:
    """Return what the bundle of a model takes at least, known before any work.

    Where shapes alone make the plan it is what the plan leaves; else what no plan touches.
    """
    if sized_by_shapes(recipe):
        return planned_bytes(source, decide_plan(source, recipe))
    return round(fixed_bytes(source.description, recipe)) - graph_bytes(source.description)


def sized_by_shapes(recipe: Recipe) -> bool:
    """Whether shapes alone make the plan: no weight and no statistic decides anything."""
    uniform = recipe.factorize.allocation == "uniform" and recipe.factorize.energy is None
    return uniform and recipe.budget is None and all(method.sized_by_shapes for method in recipe.methods)


def _planned_table(path: str, source: Source, plan: Plan) -> Finding:
    (rows, columns), spec = source.description.table_shape, plan.table
    before, after = (
        rows * columns * 4,
        matrix_bytes(rows, columns, spec, FLOAT_BYTES[plan.recipe.target.float_dtype]),
    )
    if spec is None:
        return Finding(path, Outcome.SKIPPED, "stays in floats", before, after)
    return _finding(path, before, after, spec.details())


def _tables(source: Source) -> list[str]:
    """Return the embedding and, where it has weights of its own, the output projection."""
    head = source.architecture.lm_head
    return [source.architecture.embedding, *([head] if head and not source.description.is_tied else [])]


def _planned(layer: Layer, site: SitePlan, float_dtype: str) -> Finding:
    linears = [layer.linear(path) for path in site.paths]
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    before = sum(rows * columns for rows, columns in shapes) * 4
    details: dict[str, object] = {}
    if site.form != "dense":
        details = {"rank": site.rank, "pairs": layer.kv_groups if site.form == "per_head" else 1}
    if site.form == "sparse":
        details = {"rank": site.rank, "entries": site.entries}
    if site.quant is not None:
        details |= site.quant.details()
    after = sum(
        matrix_bytes(rows, columns, site.quant, FLOAT_BYTES[float_dtype])
        for rows, columns in stored_shapes(site, shapes, layer.kv_groups)
    )
    after += site.entries * ENTRY_BYTES
    after += sum(site.correction * (rows + columns) for rows, columns in shapes) * FLOAT_BYTES[float_dtype]
    if site.reason:
        return Finding(site.site, Outcome.SKIPPED, site.reason, before, after, details=details)
    return _finding(site.site, before, after, details)


def _finding(target: str, before: int, after: int, details: dict[str, object]) -> Finding:
    return Finding(target, Outcome.APPLIED, "", before, after, details=details)


def size_summary(source: Source, rewritten: Rewritten, file_bytes: int | None) -> SizeSummary:
    """Return parameters and bytes of the dense and of the compressed model."""
    dense = source.parameter_count()
    float_bytes = FLOAT_BYTES[rewritten.plan.recipe.target.float_dtype]
    return SizeSummary(
        dense_parameters=dense,
        kept_parameters=kept_parameters(rewritten.model),
        dense_bytes=source.stored_bytes(),
        compressed_bytes=model_bytes(rewritten.model, float_bytes),
        file_bytes=file_bytes,
    )


def model_bytes(model: nn.Module, float_bytes: int) -> int:
    """Return the bytes of all tensors in the graph, shared ones once."""
    sums = [module for module in model.modules() if isinstance(module, SparseSum)]
    entries = {id(tensor) for module in sums for tensor in (module.indices, module.values)}
    tensors = {
        tensor.data_ptr(): tensor
        for tensor in model.state_dict(keep_vars=True).values()
        if id(tensor) not in entries
    }
    total = sum(_stored_bytes(tensor, float_bytes) for tensor in tensors.values())
    return total + sum(len(module.indices) * ENTRY_BYTES for module in sums)


def _stored_bytes(tensor: Tensor, float_bytes: int) -> int:
    """Return the bytes of a tensor in the graph; scales are fp16 there, whatever the other floats are."""
    size = tensor.element_size()
    return tensor.numel() * (min(float_bytes, size) if tensor.is_floating_point() else size)


def kept_parameters(model: nn.Module) -> int:
    """Return the parameters of a rewritten model: quantized matrices count their entries, tied ones once."""
    seen = {pointer: count for module in model.modules() for pointer, count in _own_parameters(module)}
    return sum(seen.values())


def _own_parameters(module: nn.Module) -> Iterator[tuple[int, int]]:
    if isinstance(module, QuantizedLinear):
        yield module.codes.data_ptr(), module.out_features * module.in_features
    elif isinstance(module, Int8Linear):
        yield module.codes.data_ptr(), module.codes.numel()
    elif isinstance(module, QuantizedEmbedding):
        yield module.codes.data_ptr(), module.num_embeddings * module.embedding_dim
    elif isinstance(module, SparseSum):
        yield module.values.data_ptr(), module.values.numel()
    for parameter in module.parameters(recurse=False):
        yield parameter.data_ptr(), parameter.numel()

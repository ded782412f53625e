"""What a model weighs, before work from its plan and afterwards from its tensors."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from rk_export.load import ModelSource
from rk_export.options import CompressOptions, QuantSpec
from rk_export.passes.base import Layer
from rk_export.passes.modules import QuantizedEmbedding, QuantizedLinear
from rk_export.passes.numerics.quantize import quantized_bytes
from rk_export.plan import Plan, SitePlan
from rk_export.planner import canonical_layers
from rk_export.report import Finding, Outcome, SizeSummary
from rk_export.rewrite import Rewritten

FLOAT_BYTES = {"fp32": 4, "fp16": 2}


def planned_findings(source: ModelSource, plan: Plan) -> list[Finding]:
    """Return what a plan would do to each site, to the embedding and to the head, from shapes alone."""
    findings = []
    for layer in canonical_layers(source.config):
        findings += [_planned(layer, site, plan.options.float_dtype) for site in plan.of_layer(layer.index)]
    if not source.architecture.is_encoder:
        findings += [_planned_table(path, source, plan.options) for path in _tables(source)]
    return findings


def _planned_table(path: str, source: ModelSource, options: CompressOptions) -> Finding:
    rows, columns, spec = source.config.vocab_size, source.config.hidden_size, options.embedding_quant
    before, after = rows * columns * 4, _stored(rows, columns, spec, FLOAT_BYTES[options.float_dtype])
    if spec is None:
        return Finding(path, Outcome.SKIPPED, "stays in floats", before, after)
    return _finding(path, before, after, {"bits": spec.bits, "block": spec.block_size})


def _tables(source: ModelSource) -> list[str]:
    """Return the embedding and, where it has weights of its own, the output projection."""
    tied = bool(getattr(source.config, "tie_word_embeddings", False))
    head = source.architecture.lm_head
    return [source.architecture.embedding, *([head] if head and not tied else [])]


def _planned(layer: Layer, site: SitePlan, float_dtype: str) -> Finding:
    linears = [layer.linear(path) for path in site.paths]
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    before = sum(rows * columns for rows, columns in shapes) * 4
    float_bytes = FLOAT_BYTES[float_dtype]
    details: dict[str, object] = {}
    matrices = shapes
    if site.form != "dense":
        pairs = layer.kv_groups if site.form == "per_head" else 1
        columns, rows = shapes[0][1], sum(shape[0] for shape in shapes)
        matrices = [(pairs * site.rank, columns), (rows, site.rank)]
        details = {"rank": site.rank, "pairs": pairs}
    if site.quant is not None:
        details |= {"bits": site.quant.bits, "block": site.quant.block_size}
    after = sum(_stored(rows, columns, site.quant, float_bytes) for rows, columns in matrices)
    if site.reason:
        return Finding(site.site, Outcome.SKIPPED, site.reason, before, after, details=details)
    return _finding(site.site, before, after, details)


def _finding(target: str, before: int, after: int, details: dict[str, object]) -> Finding:
    return Finding(target, Outcome.APPLIED, "", before, after, details=details)


def _stored(rows: int, columns: int, quant: QuantSpec | None, float_bytes: int) -> int:
    return (
        rows * columns * float_bytes if quant is None else quantized_bytes(rows, columns, quant, float_bytes)
    )


def size_summary(source: ModelSource, rewritten: Rewritten, file_bytes: int | None) -> SizeSummary:
    """Return parameters and bytes of the dense and of the compressed model."""
    dense = source.parameter_count()
    tensors = {tensor.data_ptr(): tensor for tensor in rewritten.model.state_dict().values()}
    float_bytes = FLOAT_BYTES[rewritten.plan.options.float_dtype]
    return SizeSummary(
        dense_parameters=dense,
        kept_parameters=kept_parameters(rewritten.model),
        dense_bytes=source.stored_bytes(),
        compressed_bytes=sum(
            tensor.numel() * (float_bytes if tensor.is_floating_point() else tensor.element_size())
            for tensor in tensors.values()
        ),
        file_bytes=file_bytes,
    )


def kept_parameters(model: nn.Module) -> int:
    """Return the parameters of a rewritten model: quantized matrices count their entries, tied ones once."""
    seen = {pointer: count for module in model.modules() for pointer, count in _own_parameters(module)}
    return sum(seen.values())


def _own_parameters(module: nn.Module) -> Iterator[tuple[int, int]]:
    if isinstance(module, QuantizedLinear):
        yield module.codes.data_ptr(), module.out_features * module.in_features
    elif isinstance(module, QuantizedEmbedding):
        yield module.codes.data_ptr(), module.num_embeddings * module.embedding_dim
    for parameter in module.parameters(recurse=False):
        yield parameter.data_ptr(), parameter.numel()

"""Rewritten PyTorch model -> ONNX graph with fused low-rank patterns -> model.onnx beside its external data."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import common as common_passes

from rk_export.graph.dense import frontend
from rk_export.graph.expected import emitted, graph_passes
from rk_export.graph.modules.bound import bind_weights, lazy_tensor
from rk_export.graph.swap import swap_outer, swap_projections
from rk_export.passes.graph.base import run_graph_passes
from rk_export.passes.modules.quantized import QuantizedEmbedding, QuantizedLinear
from rk_export.progress import stage
from rk_export.report.records import Fusion
from rk_export.rewrite.apply import Rewritten

# Tensors below this size stay inside model.onnx: shape inference must be able to read them.
INLINE_BELOW_BYTES = 1024


def build_graph(rewritten: Rewritten, *, group_experts: bool = True) -> tuple[ir.Model, tuple[Fusion, ...]]:
    """Return the ONNX graph of a rewritten model, weights bound lazily, and the fusions found in it.

    Args:
        rewritten: The model.
        group_experts: The chosen experts alone are computed where that is exact; else all of them, for comparison.

    Raises:
        UnsupportedModelError: If the family cannot be exported exactly.
        FusionError: If a planned pattern is missing.
    """
    options = rewritten.plan.recipe
    module = frontend.build_module(
        rewritten.description,
        ep=options.target.ep,
        dtype=options.target.float_dtype,
        positions=options.target.context_length,
    )
    swapped = swap_projections(rewritten, module, group_experts=group_experts)
    swap_outer(rewritten, module)
    passes = graph_passes(rewritten, module)
    model = frontend.trace(module)
    _bind(rewritten, module, model, swapped)
    fusions = emitted(module.module, model.graph) + run_graph_passes(passes, model)
    _finish(model)
    return model, fusions


def save_graph(model: ir.Model, folder: Path) -> None:
    """Write model.onnx and model.onnx.data; weights are converted one at a time."""
    values = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    external = sum(value is not None and value.nbytes > INLINE_BELOW_BYTES for value in values)
    with stage("writing tensors", external) as bar:
        ir.save(
            model,
            folder / "model.onnx",
            external_data="model.onnx.data",
            size_threshold_bytes=INLINE_BELOW_BYTES,
            callback=lambda *_: bar.advance(),
        )


def _bind(rewritten: Rewritten, module: frontend.OnnxModule, model: ir.Model, swapped: set[str]) -> None:
    """Give every initializer its values.

    Raises:
        TypeError: If an initializer is left without values.
    """
    bind_weights(module.module)
    skip = set(swapped)
    for path in (rewritten.architecture.embedding, rewritten.architecture.lm_head):
        if path and isinstance(rewritten.model.get_submodule(path), QuantizedEmbedding | QuantizedLinear):
            skip.add(path)
    plain: dict[str, torch.Tensor] = {
        name: tensor
        for name, tensor in rewritten.model.state_dict().items()
        if name.rpartition(".")[0] not in skip and "_factors." not in name
    }
    for name, tensor in frontend.rename_weights(module, plain).items():
        value = model.graph.initializers.get(name)
        if value is not None and value.const_value is None:
            value.const_value = lazy_tensor(value, lambda tensor=tensor: tensor)  # type: ignore[misc]
    if empty := [name for name, value in model.graph.initializers.items() if value.const_value is None]:
        raise TypeError(f"initializers without values: {', '.join(sorted(empty)[:5])}")


def _finish(model: ir.Model) -> None:
    """Drop what only the tracing needed: function bodies of operators that every runtime has, orphans."""
    model.functions.clear()
    model.producer_name, model.producer_version = "rk-export", metadata.version("rk-export")
    for node in model.graph:
        ours = {key: value for key, value in node.metadata_props.items() if key.startswith("rk_export.")}
        node.metadata_props.clear()
        node.metadata_props.update(ours)
    common_passes.RemoveUnusedNodesPass()(model)

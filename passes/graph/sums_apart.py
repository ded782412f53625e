"""Residual sums apart from their LayerNorms, for the CPU provider.

Its kernel of SkipLayerNormalization takes four to five times as long as a Sum and a LayerNormalization. ONNX Runtime
joins an Add with a norm again, and leaves a Sum alone. The kernel without a mean (RMS) is as fast as its parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rk_export.passes.graph.base import GraphPass
from rk_export.passes.graph.nodes import MICROSOFT

_JOINED = "SkipLayerNormalization"
_SUM = 3  # the output that is the sum; those between are for training


class SumsApart(GraphPass[ir.Node]):
    """Replace each SkipLayerNormalization by a Sum and a LayerNormalization."""

    name = "sums apart from LayerNorms"
    needs = "a SkipLayerNormalization must have no outputs for training"

    def matches(self, graph: ir.Graph) -> Sequence[ir.Node]:
        return [
            node for node in graph if node.op_type == _JOINED and node.domain == MICROSOFT and _plain(node)
        ]

    def rewrite(self, graph: ir.Graph, matches: Sequence[ir.Node]) -> None:
        for node in matches:
            states, residual, gain, *others = node.inputs
            shift, bias = (*others, None, None)[:2]
            total = ir.node("Sum", [value for value in (states, residual, bias) if value is not None])
            total.name = f"{node.name}.sum"
            attributes = {"axis": -1, "epsilon": node.attributes["epsilon"].as_float()}
            inputs = [value for value in (total.outputs[0], gain, shift) if value is not None]
            norm = ir.node("LayerNormalization", inputs, attributes, name=f"{node.name}.norm")
            norm.metadata_props.update(node.metadata_props)
            graph.insert_before(node, [total, norm])
            _take_place(node.outputs[0], norm.outputs[0])
            if len(node.outputs) > _SUM:
                _take_place(node.outputs[_SUM], total.outputs[0])
            graph.remove(node, safe=True)


def _plain(node: ir.Node) -> bool:
    return not any(output.uses() or output.is_graph_output() for output in node.outputs[1:_SUM])


def _take_place(old: ir.Value, new: ir.Value) -> None:
    new.type, new.shape = old.type, old.shape
    new.name, old.name = old.name, None  # an output of the graph keeps its name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)

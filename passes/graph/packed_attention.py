"""Feed the packed query, key and value to GroupQueryAttention as they are, without the Split."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from rk_export.passes.graph.base import GraphPass
from rk_export.passes.graph.nodes import is_attention

_LAST_AXIS = (-1, 2)  # of (batch, length, width)
Match = tuple[ir.Node, ir.Node]


class PackedAttention(GraphPass[Match]):
    """Remove the Split between a packed projection and the attention that reads its three parts."""

    name = "packed query, key and value"
    needs = "a Split of one packed projection must yield exactly q, k, v"

    def matches(self, graph: ir.Graph) -> Sequence[Match]:
        """Return the Split and the attention of each occurrence."""
        pairs = ((_split_of(node), node) for node in graph if is_attention(node))
        return [(split, node) for split, node in pairs if split is not None]

    def rewrite(self, graph: ir.Graph, matches: Sequence[Match]) -> None:
        for split, node in matches:
            node.replace_input_with(0, split.inputs[0])
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)
            graph.remove(split, safe=True)


def _split_of(attention: ir.Node) -> ir.Node | None:
    """Return the Split whose parts, in their order, are all that attention reads as q, k and v, or None."""
    query = attention.inputs[0]
    split = None if query is None else query.producer()
    if split is None or split.op_type != "Split" or list(split.outputs) != list(attention.inputs[:3]):
        return None
    axis = split.attributes.get("axis")
    others = any(len(part.uses()) > 1 or part.is_graph_output() for part in split.outputs)
    return None if others or axis is None or axis.as_int() not in _LAST_AXIS else split

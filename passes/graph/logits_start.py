"""Let a caller ask for the logits of the last positions only.

The graph gets an optional input `logits_start` (an initializer that may be overridden): the first position
whose logits are computed, counted as in Slice. Its default keeps every position, so runtimes that do not know
it see the ordinary contract; a generation loop feeds -1 and the output projection runs on one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.base import GraphPass
from rk_export.passes.graph.nodes import SITE_KEY, constant

NAME = "logits_start"


class LogitsStart(GraphPass[ir.Node]):
    """Slice the hidden states in front of the first node that is marked as `lm_head`; once in a decoder.

    The graph's first output are the logits (batch, length, vocabulary).
    """

    name = "logits of the last positions"
    needs = "no node is marked as lm_head and reads the hidden states, or the graph has the input already"

    def matches(self, graph: ir.Graph) -> Sequence[ir.Node]:
        if NAME in graph.initializers:
            return []
        head = next((node for node in graph if node.metadata_props.get(SITE_KEY) == "lm_head"), None)
        return [] if head is None or not head.inputs or head.inputs[0] is None else [head]

    def rewrite(self, graph: ir.Graph, matches: Sequence[ir.Node]) -> None:
        head = matches[0]
        start = constant(graph, NAME, np.array([np.iinfo(np.int64).min + 1], dtype=np.int64))
        graph.inputs.append(start)
        end = constant(graph, "rk.end", np.array([np.iinfo(np.int64).max], dtype=np.int64))
        axis = constant(graph, "rk.one", np.array([1], dtype=np.int64))
        hidden = head.inputs[0]
        assert hidden is not None  # `matches` took no other
        cut = ir.Node("", "Slice", [hidden, start, end, axis], num_outputs=1, name="lm_head.slice")
        cut.outputs[0].type = hidden.type
        graph.insert_before(head, cut)
        logits = graph.outputs[0]
        if logits.shape is not None:
            logits.shape = ir.Shape([logits.shape[0], "logits_length", logits.shape[2]])
        head.replace_input_with(0, cut.outputs[0])

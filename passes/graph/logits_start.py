"""Let a caller ask for the logits of the last positions only.

The graph gets an optional input `logits_start` (an initializer that may be overridden): the first position
whose logits are computed, counted as in Slice. Its default keeps every position, so runtimes that do not know
it see the ordinary contract; a generation loop feeds -1 and the output projection runs on one row.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.nodes import constant
from rk_export.report.records import Fusion

NAME = "logits_start"


class LogitsStart:
    """Slice the hidden states in front of the output projection.

    Args:
        planned: 1 for decoders, 0 for encoders.
    """

    name = "logits of the last positions"

    def __init__(self, planned: int) -> None:
        self.planned = planned

    def call(self, model: ir.Model) -> Fusion:
        graph = model.graph
        head = next((node for node in graph if node.metadata_props.get("rk_export.site") == "lm_head"), None)
        if head is None:
            return Fusion(self.name, self.planned, 0, "no node is marked as lm_head" if self.planned else "")
        start = constant(graph, NAME, np.array([np.iinfo(np.int64).min + 1], dtype=np.int64))
        graph.inputs.append(start)
        end = constant(graph, "rk.end", np.array([np.iinfo(np.int64).max], dtype=np.int64))
        axis = constant(graph, "rk.one", np.array([1], dtype=np.int64))
        hidden = head.inputs[0]
        if hidden is None:
            return Fusion(self.name, self.planned, 0, "the output projection has no input")
        cut = ir.Node("", "Slice", [hidden, start, end, axis], num_outputs=1, name="lm_head.slice")
        cut.outputs[0].type = hidden.type
        graph.insert_before(head, cut)
        logits = graph.outputs[0]
        if logits.shape is not None:
            logits.shape = ir.Shape([logits.shape[0], "logits_length", logits.shape[2]])
        head.replace_input_with(0, cut.outputs[0])
        return Fusion(self.name, self.planned, 1)

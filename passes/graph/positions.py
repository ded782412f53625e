"""Compute learned positions from the attention mask, so that graphs need no `position_ids` input."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.nodes import Emitter, constant
from rk_export.report.records import Fusion


class PositionsFromMask:
    """Replace the input `position_ids` by the count of attended tokens before each one.

    Args:
        planned: 1 for a family with learned positions, else 0.
    """

    name = "positions from the mask"

    def __init__(self, planned: int) -> None:
        self.planned = planned

    def call(self, model: ir.Model) -> Fusion:
        graph = model.graph
        position_ids = next((value for value in graph.inputs if value.name == "position_ids"), None)
        if position_ids is None or not position_ids.uses():
            if position_ids is not None:
                graph.inputs.remove(position_ids)
            return Fusion(
                self.name, self.planned, 0, "the graph uses no position_ids" if self.planned else ""
            )
        inputs = {value.name: value for value in graph.inputs}
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        emit = Emitter(graph, "positions")
        one = constant(graph, "rk.one", np.array([1], dtype=np.int64))
        counts = emit("CumSum", [mask, constant(graph, "rk.axis_one", np.array(1, dtype=np.int64))])
        positions = emit(
            "Max", [emit("Sub", [counts, one]), constant(graph, "rk.zero", np.array([0], dtype=np.int64))]
        )
        total, length = emit("Shape", [mask], start=1, end=2), emit("Shape", [ids], start=1, end=2)
        last = emit("Slice", [positions, emit("Sub", [total, length]), total, one])
        ir.convenience.replace_all_uses_with(position_ids, last)
        graph.inputs.remove(position_ids)
        return Fusion(self.name, self.planned, 1)

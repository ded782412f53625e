"""Compute learned positions from the attention mask, so that graphs need no `position_ids` input."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from rk_export.passes.graph.base import FusionResult, GraphPass
from rk_export.passes.graph.nodes import Emitter, constant


class PositionsFromMask(GraphPass[ir.Value]):
    """Replace the input `position_ids` by the count of attended tokens before each one.

    The pattern is found once in a family with learned positions. An input that no node reads is dropped.
    """

    name = "positions from the mask"
    needs = "the graph uses no position_ids, or lacks input_ids or attention_mask"

    def matches(self, graph: ir.Graph) -> Sequence[ir.Value]:
        inputs = {value.name: value for value in graph.inputs}
        if not {"position_ids", "input_ids", "attention_mask"} <= inputs.keys():
            return []
        return [inputs["position_ids"]] if inputs["position_ids"].uses() else []

    def call(self, model: ir.Model) -> FusionResult:
        result, inputs = super().call(model), model.graph.inputs
        for value in [value for value in inputs if value.name == "position_ids" and not value.uses()]:
            inputs.remove(value)
            result.modified = True
        return result

    def rewrite(self, graph: ir.Graph, matches: Sequence[ir.Value]) -> None:
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
        ir.convenience.replace_all_uses_with(matches[0], last)

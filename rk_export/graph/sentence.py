"""The vector of a text in the graph: pooling and the modules behind it, as sentence-transformers computes them.

Everything is computed in float32, also behind hidden states in fp16: sums over many tokens need it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from rk_export.model.sentence_modules import Dense, Norm
from rk_export.passes.graph.nodes import constant
from rk_export.source.sentence_head import SentenceHead

STATES, VECTOR = "last_hidden_state", "sentence_embedding"
_LEAST = 1e-9  # what sentence-transformers divides by where no token counts
_SHORTEST = 1e-12  # a vector's least length in torch's normalize
_NORM_EPSILON = 1e-5  # torch's default


def add_sentence_embedding(model: ir.Model, head: SentenceHead) -> None:
    """Add the output ``sentence_embedding``, float32 (batch, width), behind the output ``last_hidden_state``.

    Args:
        model: A graph that has the input ``attention_mask``; changed in place.
        head: What is computed.
    """
    graph = model.graph
    states = next(value for value in graph.outputs if value.name == STATES)
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    build = _Vector(graph, states, mask)
    pooled = [build.pooled(mode) for mode in head.modules.pooling]
    vector = pooled[0] if len(pooled) == 1 else build("Concat", *pooled, axis=-1)
    for step in head.modules.steps:
        if isinstance(step, Dense):
            vector = build.dense(vector, step, head)
        elif isinstance(step, Norm):
            vector = build.norm(vector, step, head)
        else:
            vector = build.normalized(vector)
    output = build("Identity", vector)
    output.name = VECTOR
    output.type = ir.TensorType(ir.DataType.FLOAT)
    output.shape = ir.Shape([states.shape[0] if states.shape is not None else None, head.modules.width])
    graph.outputs.append(output)


class _Vector:
    """Appends nodes to a graph.

    Args:
        graph: The graph.
        states: Hidden states (batch, length, width).
        mask: int64 (batch, length), 0 at padding.
    """

    def __init__(self, graph: ir.Graph, states: ir.Value, mask: ir.Value) -> None:
        self._graph, self._count = graph, 0
        self._states = self("Cast", states, to=ir.DataType.FLOAT.value)
        self._mask = self("Cast", mask, to=ir.DataType.FLOAT.value)

    def __call__(self, op_type: str, *inputs: ir.Value, **attributes: int | float) -> ir.Value:
        node = ir.node(op_type, inputs, attributes, name=f"sentence.{self._count}.{op_type}")
        self._count += 1
        self._graph.append(node)
        node.outputs[0].name = f"{node.name}.out"
        return node.outputs[0]

    def pooled(self, mode: str) -> ir.Value:
        """Return the vector (batch, width) of one mode of pooling."""
        if mode == "cls":  # the first token that is no padding
            return self._state_at(self("ArgMax", self._mask, axis=1, keepdims=1))
        if mode == "lasttoken":
            last = self("ArgMax", self._mask, axis=1, keepdims=1, select_last_index=1)
            counts = self("ReduceMax", self._mask, self._ints([1]), keepdims=1)
            return self("Mul", self._state_at(last), counts)
        if mode == "max":
            hidden = self("Unsqueeze", self("Cast", self._mask, to=ir.DataType.BOOL.value), self._ints([2]))
            shown = self("Where", hidden, self._states, self._floats(-np.inf))
            return self("ReduceMax", shown, self._ints([1]), keepdims=0)
        weights = self._mask if mode != "weightedmean" else self("Mul", self._mask, self._places())
        total = self("ReduceSum", weights, self._ints([1]), keepdims=1)
        total = self("Max", total, self._floats(_LEAST))
        divisor = self("Sqrt", total) if mode == "mean_sqrt_len_tokens" else total
        rows = self("MatMul", self("Unsqueeze", weights, self._ints([1])), self._states)
        return self("Div", self("Squeeze", rows, self._ints([1])), divisor)

    def _places(self) -> ir.Value:
        """Return the places of tokens, counted from 1 at the first one that is no padding."""
        ones = self("Max", self._mask, self._floats(1.0))
        counted = self("CumSum", ones, self._ints(1))
        first = self("ArgMax", self._mask, axis=1, keepdims=1)
        return self("Sub", counted, self("Cast", first, to=ir.DataType.FLOAT.value))

    def _state_at(self, index: ir.Value) -> ir.Value:
        return self("GatherND", self._states, index, batch_dims=1)

    def dense(self, vector: ir.Value, step: Dense, head: SentenceHead) -> ir.Value:
        """Return a dense layer's result."""
        result = self("MatMul", vector, self._matrix(f"{step.folder}.linear.weight", head))
        if step.bias:
            result = self("Add", result, self._weight(f"{step.folder}.linear.bias", head))
        if step.activation == "SiLU":
            result = self("Mul", result, self("Sigmoid", result))
        elif step.activation == "ReLU":
            result = self("Relu", result)
        elif step.activation == "GELU":
            result = self("Gelu", result)
        elif step.activation != "Identity":
            result = self(step.activation, result)
        if not step.residual:
            return result
        if step.sizes[0] != step.sizes[1]:
            vector = self("MatMul", vector, self._matrix(f"{step.folder}.residual.weight", head))
        return self("Add", result, vector)

    def norm(self, vector: ir.Value, step: Norm, head: SentenceHead) -> ir.Value:
        """Return a LayerNorm's result."""
        gain, bias = (self._weight(f"{step.folder}.norm.{name}", head) for name in ("weight", "bias"))
        return self("LayerNormalization", vector, gain, bias, axis=-1, epsilon=_NORM_EPSILON)

    def normalized(self, vector: ir.Value) -> ir.Value:
        """Return a vector scaled to length 1."""
        length = self("ReduceL2", vector, self._ints([1]), keepdims=1)
        return self("Div", vector, self("Max", length, self._floats(_SHORTEST)))

    def _weight(self, name: str, head: SentenceHead) -> ir.Value:
        return constant(self._graph, f"sentence.{name}", head.weights[name].numpy())

    def _matrix(self, name: str, head: SentenceHead) -> ir.Value:
        """Return a matrix with the elements that go in first."""
        return constant(self._graph, f"sentence.{name}", np.ascontiguousarray(head.weights[name].numpy().T))

    def _ints(self, value: int | list[int]) -> ir.Value:
        array = np.array(value, np.int64)
        return constant(self._graph, f"sentence.int.{array.ndim}.{array.item()}", array)

    def _floats(self, value: float) -> ir.Value:
        return constant(self._graph, f"sentence.float.{value:g}", np.array(value, np.float32))

"""The head of an encoder that gives logits: for a text, or for each of its tokens."""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
from mobius.components import Linear, get_activation
from onnxscript import OpBuilder, nn

from rk_export.model.encoder_spec import ClassifierSpec, EncoderSpec


class Classifier(nn.Module):
    """Pooling, a dense layer where there is one, and the classifier.

    Args:
        spec: What the encoder computes.
        classifier: What the head computes.
        biases: Paths of the linears that have a bias.
        norm: The norm behind the activation, used where the head has one.
    """

    def __init__(
        self, spec: EncoderSpec, classifier: ClassifierSpec, biases: Collection[str], norm: nn.Module
    ) -> None:
        super().__init__()
        width = spec.hidden_size
        self.dense = self.norm = None
        if classifier.activation:
            self.dense = Linear(width, width, bias="head.dense" in biases)
            self._activation = get_activation(classifier.activation)
        if classifier.norm:
            self.norm = norm
        self.classifier = Linear(width, classifier.labels, bias="head.classifier" in biases)
        self._pooling, self._by_token = classifier.pooling, classifier.by_token

    def forward(self, op: OpBuilder, hidden: ir.Value, attention_mask: ir.Value) -> ir.Value:
        """Return logits (batch, labels), or (batch, length, labels) where each token has an answer.

        Args:
            op: The builder.
            hidden: (batch, length, width).
            attention_mask: (batch, length) int64, 0 at padding.
        """
        if self._by_token:
            return self._answer(op, hidden)
        if self._pooling == "first":
            return self._answer(op, _first(op, hidden, attention_mask))
        if self._pooling == "mean":
            return self._answer(op, _mean(op, hidden, attention_mask))
        return _mean(op, self._answer(op, hidden), attention_mask)

    def _answer(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        if self.dense is not None:
            states = self._activation(op, self.dense(op, states))
        if self.norm is not None:
            states = self.norm(op, states)
        logits: ir.Value = self.classifier(op, states)
        return logits


def _first(op: OpBuilder, hidden: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """Return the state of each row's first token that is no padding, (batch, width)."""
    # ArgMax has no kernel for integers on CUDA; of equal values it takes the first.
    place = op.ArgMax(op.Cast(attention_mask, to=ir.DataType.FLOAT), axis=1, keepdims=1)
    state: ir.Value = op.GatherND(hidden, place, batch_dims=1)
    return state


def _mean(op: OpBuilder, states: ir.Value, attention_mask: ir.Value) -> ir.Value:
    """Return the mean over each row's tokens that are no padding, (batch, width)."""
    weights = op.CastLike(attention_mask, states)
    total = op.ReduceSum(op.Mul(states, op.Unsqueeze(weights, [2])), [1], keepdims=0)
    mean: ir.Value = op.Div(total, op.ReduceSum(weights, [1], keepdims=1))
    return mean

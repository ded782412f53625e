"""The encoder: mobius' BERT on ``com.microsoft.MultiHeadAttention``."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from mobius import ArchitectureConfig
from mobius.models.bert import BertModel
from onnxscript import OpBuilder, nn


class Encoder(BertModel):
    """mobius' BERT with layers that honour the padding mask."""

    def __init__(self, config: ArchitectureConfig) -> None:
        super().__init__(config)
        self.encoder.layer = nn.ModuleList([_EncoderLayer(layer) for layer in self.encoder.layer])


class _EncoderLayer(nn.Module):
    """A BERT layer from the parts of mobius'; its paths are the names of its initializers."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.attention = _EncoderAttention(layer.attention)
        self.intermediate = layer.intermediate
        self.dense, self.LayerNorm = layer.output.dense, layer.output.LayerNorm

    def forward(self, op: OpBuilder, hidden: ir.Value, attention_mask: ir.Value) -> ir.Value:
        hidden = self.attention(op, hidden, attention_mask)
        transformed = self.dense(op, self.intermediate(op, hidden))
        normed: ir.Value = self.LayerNorm(op, op.Add(hidden, transformed))
        return normed


class _EncoderAttention(nn.Module):
    """Bidirectional attention on the keys that ``attention_mask`` (batch, keys) marks with 1."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        projections, output = attention.self, attention.output
        self.query, self.key, self.value = projections.query, projections.key, projections.value
        self.dense, self.LayerNorm = output.dense, output.LayerNorm
        self._heads = projections.num_heads

    def forward(self, op: OpBuilder, hidden: ir.Value, attention_mask: ir.Value) -> ir.Value:
        attended = op.MultiHeadAttention(
            self.query(op, hidden),
            self.key(op, hidden),
            self.value(op, hidden),
            None,
            op.Cast(attention_mask, to=ir.DataType.INT32),
            num_heads=self._heads,
            _domain="com.microsoft",
        )
        normed: ir.Value = self.LayerNorm(op, op.Add(hidden, self.dense(op, attended)))
        return normed

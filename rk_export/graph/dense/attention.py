"""Attention of a decoder layer: projections around one ``com.microsoft.GroupQueryAttention`` node.

Rotation, sliding window and soft cap are inside the operator. Inputs that only one execution provider takes (norm
weights and position ids) are not wired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import onnx_ir as ir
from mobius.components import Linear
from onnxscript import OpBuilder, nn

from rk_export.graph.dense.norms import norm_of, query_key_norm
from rk_export.graph.modules.base import ExportModule, Pattern, operators
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.rotary import ROTATED_MULTIPLE, RotaryTable
from rk_export.passes.graph.nodes import MICROSOFT

ATTENTION = operators("GroupQueryAttention", MICROSOFT, "GroupQueryAttention")
# What a layer hands on to the next call: keys and values, or the state of a short convolution.
Carried = tuple[ir.Value, ...]


class Biases(NamedTuple):
    """Which matrices of a decoder have biases."""

    query_key_value: bool
    output: bool
    mlp: bool
    head: bool
    conv: bool = False


class RowTexts(NamedTuple):
    """Which columns of the new tokens are text, the same for all layers.

    Args:
        is_text: (batch, length, 1), 1 for a token and 0 for padding before, between and behind tokens.
        has_begun: (batch, length, 1), 0 for padding before the first token and 1 elsewhere.
        last_rows: (batch, taps) int64, where the last tokens of each row stand in the state and the new tokens of all
            rows below each other.
    """

    is_text: ir.Value
    has_begun: ir.Value
    last_rows: ir.Value


class Shared(NamedTuple):
    """Values that all layers of a graph use.

    Args:
        last_key: (batch,) int32, index of each row's last key.
        key_count: () int32, keys after this step, of the longest row.
        tables: Name of a rotary table -> cosines, sines, each (positions, rotated width / 2).
        positions: (batch, length) int64, the position of each token in its row; None where no layer reads it.
        query_factor: (batch, length, 1), factor on the queries; None for 1.
        distance_bias: (batch, heads, length, keys), added to the scores; None for nothing.
        texts: What short convolutions read from the mask; None where no layer has one.
    """

    last_key: ir.Value
    key_count: ir.Value
    tables: Mapping[str, tuple[ir.Value, ir.Value]]
    positions: ir.Value | None = None
    query_factor: ir.Value | None = None
    distance_bias: ir.Value | None = None
    texts: RowTexts | None = None


def rotates_apart(spec: DecoderSpec, table: RotaryTable) -> bool:
    """Whether queries and keys are rotated by an operator of its own in front of attention.

    A norm stands behind the rotation, or GroupQueryAttention does not take the width.
    """
    widths = (table.width, spec.heads.head_dim)
    return spec.norm_after_rotation or any(width % ROTATED_MULTIPLE for width in widths)


class Attention(ExportModule):
    """Projections around one GroupQueryAttention node.

    The node rotates queries and keys, appends to the cache and masks: a query sees the keys up to its own
    position, at most ``local_window_size`` of them.

    Args:
        spec: Of the decoder.
        biases: Which projections have one.
        index: Number of the layer.
        tables: Name of a rotary table -> the table.
    """

    def __init__(
        self, spec: DecoderSpec, biases: Biases, index: int, tables: Mapping[str, RotaryTable]
    ) -> None:
        super().__init__()
        heads, layer = spec.heads, spec.layers[index]
        rows, kv_rows = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
        self.q_proj = Linear(spec.hidden_size, rows, bias=biases.query_key_value)
        self.k_proj = Linear(spec.hidden_size, kv_rows, bias=biases.query_key_value)
        self.v_proj = Linear(spec.hidden_size, kv_rows, bias=biases.query_key_value)
        self.o_proj = Linear(rows, spec.hidden_size, bias=biases.output)
        self.q_norm = self.k_norm = None
        if spec.query_key_norm is not None:
            self.q_norm, self.k_norm = (
                query_key_norm(spec, count) for count in (heads.heads, heads.kv_heads)
            )
        self.attn_sub_norm = norm_of(spec, rows) if spec.sub_norms else None
        self._norms_rotated, self._clip = spec.norm_after_rotation, spec.clip
        self._heads, self._has_factor = heads, spec.query_growth is not None
        self._rotary, self._table = layer.rotary, None if layer.rotary is None else tables[layer.rotary]
        self._rotates_apart = self._table is not None and rotates_apart(spec, self._table)
        self._interleaved = int(spec.rotary_interleaved)
        self._attributes: dict[str, Any] = {
            "num_heads": heads.heads,
            "kv_num_heads": heads.kv_heads,
            "scale": layer.attention_scale,
            "do_rotary": int(layer.rotary is not None and not self._rotates_apart),
        }
        if spec.rotary_interleaved and self._attributes["do_rotary"]:
            self._attributes["rotary_interleaved"] = 1
        if spec.attention_softcap:
            self._attributes["softcap"] = spec.attention_softcap
        if layer.window is not None:
            self._attributes["local_window_size"] = layer.window

    @property
    def takes_products(self) -> bool:
        """Whether the operator reads q, k and v as the projections return them."""
        return self.q_norm is None and not (self._clip or self._has_factor or self._rotates_apart)

    def emits(self) -> Counter[Pattern]:
        return Counter({ATTENTION: 1})

    def forward(
        self, op: OpBuilder, hidden: ir.Value, shared: Shared, past: Carried
    ) -> tuple[ir.Value, Carried]:
        query, key = self._query_and_key(op, hidden, shared)
        rotary: tuple[ir.Value | None, ...] = ()
        if self._attributes["do_rotary"] and self._rotary is not None:
            rotary = shared.tables[self._rotary]
        if shared.distance_bias is not None:
            rotary = (*(rotary or (None, None)), None, shared.distance_bias)
        attended, key, value = op.GroupQueryAttention(
            query,
            key,
            self._clipped(op, self.v_proj(op, hidden)),
            *past,
            shared.last_key,
            shared.key_count,
            *rotary,
            _domain="com.microsoft",
            _outputs=3,
            **self._attributes,
        )
        if self.attn_sub_norm is not None:
            attended = self.attn_sub_norm(op, attended)
        return self.o_proj(op, attended), (key, value)

    def _query_and_key(self, op: OpBuilder, hidden: ir.Value, shared: Shared) -> tuple[ir.Value, ir.Value]:
        """Return queries and keys as the operator reads them, each (batch, length, heads * width)."""
        query, key = self.q_proj(op, hidden), self.k_proj(op, hidden)
        if not self._norms_rotated:
            query, key = _normed(op, self.q_norm, query), _normed(op, self.k_norm, key)
        query, key = self._clipped(op, query), self._clipped(op, key)
        if self._rotates_apart:
            query = self._rotated(op, query, shared, self._heads.heads)
            key = self._rotated(op, key, shared, self._heads.kv_heads)
        if self._norms_rotated:
            query, key = _normed(op, self.q_norm, query), _normed(op, self.k_norm, key)
        # The factor is one number a token, so it commutes with the rotation.
        return (query if shared.query_factor is None else op.Mul(query, shared.query_factor)), key

    def _clipped(self, op: OpBuilder, states: ir.Value) -> ir.Value:
        if not self._clip:
            return states
        low, high = (
            op.CastLike(op.Constant(value_float=bound), states) for bound in (-self._clip, self._clip)
        )
        clipped: ir.Value = op.Clip(states, low, high)
        return clipped

    def _rotated(self, op: OpBuilder, states: ir.Value, shared: Shared, heads: int) -> ir.Value:
        table = self._table
        if table is None or self._rotary is None:
            return states
        partial = {} if table.width == self._heads.head_dim else {"rotary_embedding_dim": table.width}
        rotated: ir.Value = op.RotaryEmbedding(
            states,
            shared.positions,
            *shared.tables[self._rotary],
            num_heads=heads,
            interleaved=self._interleaved,
            **partial,
            _domain="com.microsoft",
        )
        return rotated


def _normed(op: OpBuilder, norm: nn.Module | None, states: ir.Value) -> ir.Value:
    return states if norm is None else norm(op, states)

"""The encoder of all families, on ``com.microsoft.GroupQueryAttention`` without a cache.

Rotation is inside the operator. Padding, windows and biases by relative position are one bias on the scores: the
operator's own window is causal on CUDA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import onnx_ir as ir
from mobius.components import Embedding, Linear, get_activation
from onnxscript import OpBuilder, nn

from rk_export.graph.dense.attention import ATTENTION
from rk_export.graph.dense.decoder import SKIP_NORM
from rk_export.graph.dense.encoder_bias import ScoreBias
from rk_export.graph.dense.encoder_head import Classifier
from rk_export.graph.dense.norms import JOINED_WITH_SUM, norm_of, query_key_norm
from rk_export.graph.dense.rotary import Rotary, scaled
from rk_export.graph.modules.base import ExportModule, Pattern
from rk_export.model.encoder_spec import EncoderSpec, LearnedPositions
from rk_export.model.rotary import RotaryTable
from rk_export.passes.graph.nodes import MICROSOFT


class _Shared(NamedTuple):
    """Values that all layers of a graph use.

    Args:
        last_key: (batch,) int32, index of the last key.
        key_count: () int32, keys of a row.
        tables: Name of a rotary table -> cosines, sines, each (positions, rotated width / 2).
        biases: Reach of a window -> bias on the scores (batch, 1 or heads, length, length).
    """

    last_key: ir.Value
    key_count: ir.Value
    tables: Mapping[str, tuple[ir.Value, ir.Value]]
    biases: Mapping[int | None, ir.Value]


class Encoder(nn.Module):
    """Encoder with the head that its model has: token ids and mask to hidden states, or to logits.

    Args:
        spec: What it computes.
        biases: Paths of the linears that have a bias.
        tables: Rotary tables by name.
        dtype: The graph's floats.
    """

    def __init__(
        self,
        spec: EncoderSpec,
        biases: Collection[str],
        tables: Mapping[str, RotaryTable],
        dtype: ir.DataType,
    ) -> None:
        super().__init__()
        self.model = _EncoderBody(spec, biases, tables, dtype)
        self.head = None
        if spec.classifier is not None:
            self.head = Classifier(spec, spec.classifier, biases, norm_of(spec, spec.hidden_size))
        self.reads_types = spec.token_types > 1

    @property
    def output(self) -> str:
        """Name of the graph's output."""
        return "last_hidden_state" if self.head is None else "logits"

    def forward(
        self, op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value, token_type_ids: ir.Value | None
    ) -> ir.Value:
        hidden: ir.Value = self.model(op, input_ids, attention_mask, token_type_ids)
        return hidden if self.head is None else self.head(op, hidden, attention_mask)


class _EncoderBody(ExportModule):
    def __init__(
        self,
        spec: EncoderSpec,
        biases: Collection[str],
        tables: Mapping[str, RotaryTable],
        dtype: ir.DataType,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(spec.vocab_size, spec.embedding_size)
        self.embed_positions = self.embed_types = self.embed_norm = self.embed_projection = None
        if spec.positions is not None:
            self.embed_positions = _Positions(spec.positions, spec.embedding_size)
        if spec.token_types:
            self.embed_types = Embedding(spec.token_types, spec.embedding_size)
        if spec.embedding_norm:
            self.embed_norm = norm_of(spec, spec.embedding_size)
        if spec.embedding_size != spec.hidden_size:
            self.embed_projection = _linear(
                biases, "model.embed_projection", spec.embedding_size, spec.hidden_size
            )
        self.layers = nn.ModuleList([_Layer(spec, biases, index) for index in range(len(spec.layers))])
        self.norm = norm_of(spec, spec.hidden_size) if spec.final_norm else None
        reaches = dict.fromkeys(layer.reach for layer in spec.layers)
        self.relative_bias = ScoreBias(spec, tuple(reaches), dtype)
        self.rotary = {name: Rotary(table, f"rotary_{name}", dtype) for name, table in tables.items()}
        for rotary in self.rotary.values():
            setattr(self, cast(str, rotary.name), rotary)
        self._embedding_scale, self._joins = spec.embedding_scale, spec.norm in JOINED_WITH_SUM

    def emits(self) -> Counter[Pattern]:
        return Counter({SKIP_NORM: int(self.norm is not None and self._joins)})

    def forward(
        self, op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value, token_type_ids: ir.Value | None
    ) -> ir.Value:
        hidden = self._embedded(op, input_ids, attention_mask, token_type_ids)
        length = op.Gather(op.Shape(input_ids), op.Constant(value_int=1))
        last = op.Cast(op.Sub(length, op.Constant(value_int=1)), to=ir.DataType.INT32)
        batch = op.Shape(input_ids, start=0, end=1)
        shared = _Shared(
            last_key=op.Expand(last, batch),
            key_count=op.Cast(length, to=ir.DataType.INT32),
            tables={name: rotary(op, length) for name, rotary in self.rotary.items()},
            biases=self.relative_bias(op, attention_mask, length),
        )
        for layer in self.layers:
            hidden = layer(op, hidden, shared)
        return hidden if self.norm is None else self.norm(op, hidden)

    def _embedded(
        self, op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value, token_type_ids: ir.Value | None
    ) -> ir.Value:
        parts = [scaled(op, self.embed_tokens(op, input_ids), self._embedding_scale)]
        if self.embed_types is not None:
            # One type only: no input tells it.
            types = op.Sub(input_ids, input_ids) if token_type_ids is None else token_type_ids
            parts.append(self.embed_types(op, types))
        if self.embed_positions is not None:
            parts.append(self.embed_positions(op, input_ids, attention_mask))
        # An Add in front of the norm would be taken for a residual sum.
        hidden: ir.Value = parts[0] if len(parts) == 1 else op.Sum(*parts)
        if self.embed_norm is not None:
            hidden = self.embed_norm(op, hidden)
        return hidden if self.embed_projection is None else self.embed_projection(op, hidden)


class _Positions(Embedding):
    """Learned positions, counted from the mask or from the tokens."""

    def __init__(self, positions: LearnedPositions, width: int) -> None:
        super().__init__(positions.rows, width)
        self._padding = positions.padding

    def forward(self, op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> ir.Value:
        axis = op.Constant(value_int=1)
        if self._padding is None:
            before = op.Sub(op.CumSum(attention_mask, axis), axis)
            # Padding on the left has none before it.
            places = op.Max(before, op.Constant(value_ints=[0]))
        else:
            padding = op.Constant(value_int=self._padding)
            own = op.Cast(op.Not(op.Equal(input_ids, padding)), to=ir.DataType.INT64)
            places = op.Add(op.Mul(op.CumSum(own, axis), own), padding)
        rows: ir.Value = super().forward(op, places)
        return rows


class _Layer(ExportModule):
    """Attention and MLP on a residual stream, with the norms that the family has around each."""

    def __init__(self, spec: EncoderSpec, biases: Collection[str], index: int) -> None:
        super().__init__()
        self.self_attn = EncoderAttention(spec, biases, index)
        self.mlp = _Mlp(spec, biases, index)
        self._names, self._norm_on_sum = spec.norm_names, spec.norm_on_sum
        if not spec.layers[index].attention_norm:
            self._names = self._names._replace(before_attention=None)
        for name in filter(None, self._names):
            setattr(self, name, norm_of(spec, spec.hidden_size))
        self._is_first, self._joins = index == 0, spec.norm in JOINED_WITH_SUM

    def forward(self, op: OpBuilder, hidden: ir.Value, shared: _Shared) -> ir.Value:
        names = self._names
        attended = self.self_attn(op, self._normed(op, names.before_attention, hidden), shared)
        hidden = self._added(op, hidden, attended, names.after_attention)
        transformed = self.mlp(op, self._normed(op, names.before_mlp, hidden))
        return self._added(op, hidden, transformed, names.after_mlp)

    def emits(self) -> Counter[Pattern]:
        """The norms that read the residual stream as it was summed; the first layer reads the embedding."""
        names = self._names
        reading = [names.after_attention, names.after_mlp] if self._norm_on_sum else [names.before_mlp]
        if not self._is_first and not self._norm_on_sum:
            reading.append(names.before_attention)
        return Counter({SKIP_NORM: self._joins * sum(name is not None for name in reading)})

    def _added(self, op: OpBuilder, hidden: ir.Value, states: ir.Value, norm: str | None) -> ir.Value:
        if self._norm_on_sum:
            return self._normed(op, norm, op.Add(hidden, states))
        total: ir.Value = op.Add(hidden, self._normed(op, norm, states))
        return total

    def _normed(self, op: OpBuilder, name: str | None, hidden: ir.Value) -> ir.Value:
        return hidden if name is None else getattr(self, name)(op, hidden)


class EncoderAttention(ExportModule):
    """Projections around one GroupQueryAttention node, which rotates queries and keys.

    Args:
        spec: What the encoder computes.
        biases: Paths of the linears that have a bias.
        index: Of the layer.
    """

    def __init__(self, spec: EncoderSpec, biases: Collection[str], index: int) -> None:
        super().__init__()
        heads, layer = spec.heads, spec.layers[index]
        rows, kv_rows = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
        path = f"model.layers.{index}.self_attn"
        self.q_proj = _linear(biases, f"{path}.q_proj", spec.hidden_size, rows)
        self.k_proj = _linear(biases, f"{path}.k_proj", spec.hidden_size, kv_rows)
        self.v_proj = _linear(biases, f"{path}.v_proj", spec.hidden_size, kv_rows)
        self.o_proj = _linear(biases, f"{path}.o_proj", rows, spec.hidden_size)
        self.q_norm = self.k_norm = None
        if spec.query_key_norm is not None:
            self.q_norm = query_key_norm(spec, heads.heads)
            self.k_norm = query_key_norm(spec, heads.kv_heads)
        self._rotary, self._reach = layer.rotary, layer.reach
        self._attributes: dict[str, Any] = {
            "num_heads": heads.heads,
            "kv_num_heads": heads.kv_heads,
            "scale": layer.attention_scale,
            "do_rotary": int(layer.rotary is not None),
            "causal": int(spec.causal),
        }

    @property
    def takes_products(self) -> bool:
        """Whether the operator reads q, k and v as the projections return them."""
        return self.q_norm is None

    def emits(self) -> Counter[Pattern]:
        return Counter({ATTENTION: 1})

    def forward(self, op: OpBuilder, hidden: ir.Value, shared: _Shared) -> ir.Value:
        rotary = (None, None) if self._rotary is None else shared.tables[self._rotary]
        attended = op.GroupQueryAttention(
            _normed(op, self.q_norm, self.q_proj(op, hidden)),
            _normed(op, self.k_norm, self.k_proj(op, hidden)),
            self.v_proj(op, hidden),
            None,  # no keys
            None,  # and no values before these
            shared.last_key,
            shared.key_count,
            *rotary,
            None,  # positions are those of the columns
            shared.biases[self._reach],
            _domain=MICROSOFT,
            _outputs=1,
            **self._attributes,
        )
        output: ir.Value = self.o_proj(op, attended)
        return output


class _Mlp(nn.Module):
    def __init__(self, spec: EncoderSpec, biases: Collection[str], index: int) -> None:
        super().__init__()
        path, inner = f"model.layers.{index}.mlp", spec.intermediate_size
        self.gate_proj = None
        if spec.gated_mlp:
            self.gate_proj = _linear(biases, f"{path}.gate_proj", spec.hidden_size, inner)
        self.up_proj = _linear(biases, f"{path}.up_proj", spec.hidden_size, inner)
        self.down_proj = _linear(biases, f"{path}.down_proj", inner, spec.hidden_size)
        self._activation = get_activation(spec.activation)

    def forward(self, op: OpBuilder, hidden: ir.Value) -> ir.Value:
        up = self.up_proj(op, hidden)
        if self.gate_proj is None:
            inner = self._activation(op, up)
        else:
            inner = op.Mul(self._activation(op, self.gate_proj(op, hidden)), up)
        output: ir.Value = self.down_proj(op, inner)
        return output


def _normed(op: OpBuilder, norm: nn.Module | None, states: ir.Value) -> ir.Value:
    return states if norm is None else norm(op, states)


def _linear(biases: Collection[str], path: str, columns: int, rows: int) -> nn.Module:
    return Linear(columns, rows, bias=path in biases)

"""The decoder of all families: embedding, layers, output projection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import cast

import onnx_ir as ir
from mobius.components import Embedding, Linear
from onnxscript import OpBuilder, nn

from rk_export.graph.dense.alibi import distance_bias
from rk_export.graph.dense.attention import Attention, Biases, Carried, Shared, rotates_apart
from rk_export.graph.dense.mixture import Mixture
from rk_export.graph.dense.mlp import Mlp
from rk_export.graph.dense.norms import JOINED_WITH_SUM, norm_of
from rk_export.graph.dense.rotary import Rotary, scaled
from rk_export.graph.dense.short_conv import ShortConv, row_texts
from rk_export.graph.modules.base import ExportModule, Pattern, operators
from rk_export.model.decoder_spec import DecoderSpec, QueryGrowth
from rk_export.model.rotary import RotaryTable
from rk_export.passes.graph.nodes import MICROSOFT

SKIP_NORM = operators(
    "residual sum with norm", MICROSOFT, "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"
)


class Decoder(nn.Module):
    """Decoder with output projection: input ids and cache to logits and the longer cache.

    Args:
        spec: What it computes.
        biases: Which matrices have one.
        tables: Name of a rotary table -> the table.
        dtype: Of the floats.
    """

    def __init__(
        self,
        spec: DecoderSpec,
        biases: Biases,
        tables: Mapping[str, RotaryTable],
        dtype: ir.DataType,
    ) -> None:
        super().__init__()
        self.model = _DecoderBody(spec, biases, tables, dtype)
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=biases.head)
        if spec.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._logit_scale, self._logit_softcap = spec.logit_scale, spec.logit_softcap

    @property
    def reads_positions(self) -> bool:
        """Whether the graph reads ``position_ids``."""
        return self.model.reads_positions

    def forward(
        self,
        op: OpBuilder,
        input_ids: ir.Value,
        attention_mask: ir.Value,
        position_ids: ir.Value,
        past_key_values: Sequence[Carried],
    ) -> tuple[ir.Value, list[Carried]]:
        hidden, present = self.model(op, input_ids, attention_mask, position_ids, past_key_values)
        logits = scaled(op, self.lm_head(op, hidden), self._logit_scale)
        if self._logit_softcap:
            capped = op.Tanh(op.Div(logits, self._logit_softcap))
            logits = op.Mul(capped, self._logit_softcap)
        return logits, present


class _DecoderBody(ExportModule):
    def __init__(
        self,
        spec: DecoderSpec,
        biases: Biases,
        tables: Mapping[str, RotaryTable],
        dtype: ir.DataType,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size)
        self.embed_positions = None
        if spec.learned_positions:
            self.embed_positions = Embedding(spec.learned_positions, spec.hidden_size)
        self.embed_norm = norm_of(spec, spec.hidden_size) if spec.embedding_norm else None
        layers = (_Layer(spec, biases, index, tables) for index in range(len(spec.layers)))
        self.layers = nn.ModuleList(list(layers))
        self.norm = norm_of(spec, spec.hidden_size)
        self.rotary = {name: Rotary(table, f"rotary_{name}", dtype) for name, table in tables.items()}
        for rotary in self.rotary.values():
            setattr(self, cast(str, rotary.name), rotary)
        self._spec, self._dtype = spec, dtype
        self._rotates_apart = any(rotates_apart(spec, table) for table in tables.values())

    @property
    def reads_positions(self) -> bool:
        """Whether anything here depends on the position of a token in its row, rotation inside attention aside."""
        spec = self._spec
        return bool(spec.learned_positions or spec.query_growth or spec.alibi_slopes or self._rotates_apart)

    def emits(self) -> Counter[Pattern]:
        return Counter({SKIP_NORM: int(self._spec.norm in JOINED_WITH_SUM)})

    def forward(
        self,
        op: OpBuilder,
        input_ids: ir.Value,
        attention_mask: ir.Value,
        position_ids: ir.Value,
        past_key_values: Sequence[Carried],
    ) -> tuple[ir.Value, list[Carried]]:
        hidden = scaled(op, self.embed_tokens(op, input_ids), self._spec.embedding_scale)
        if self.embed_positions is not None:
            hidden = op.Add(hidden, self.embed_positions(op, position_ids))
        if self.embed_norm is not None:
            hidden = self.embed_norm(op, hidden)
        shared = self._shared(op, input_ids, attention_mask, position_ids)
        present = []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            hidden, layer_present = layer(op, hidden, shared, past)
            present.append(layer_present)
        return self.norm(op, hidden), present

    def _shared(
        self, op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value, position_ids: ir.Value
    ) -> Shared:
        last_key = op.Sub(op.ReduceSum(attention_mask, [1], keepdims=0), op.Constant(value_int=1))
        key_count = op.Gather(op.Shape(attention_mask), op.Constant(value_int=1))
        growth = self._spec.query_growth
        bias = None
        if self._spec.alibi_slopes:
            bias = distance_bias(op, self._spec, attention_mask, position_ids, self._dtype)
        taps = self._spec.conv_taps
        return Shared(
            last_key=op.Cast(last_key, to=ir.DataType.INT32),
            key_count=op.Cast(key_count, to=ir.DataType.INT32),
            tables={name: rotary(op, key_count) for name, rotary in self.rotary.items()},
            positions=position_ids if self._rotates_apart else None,
            query_factor=None if growth is None else _query_factor(op, growth, position_ids, self._dtype),
            distance_bias=bias,
            texts=row_texts(op, input_ids, attention_mask, taps, self._dtype) if taps else None,
        )


def _query_factor(op: OpBuilder, growth: QueryGrowth, positions: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Return ``1 + beta ln(1 + floor(position / original))``, (batch, length, 1)."""
    blocks = op.Cast(op.Div(positions, op.Constant(value_int=growth.original)), to=ir.DataType.FLOAT)
    one = op.Constant(value_float=1.0)
    grown = op.Add(op.Mul(op.Log(op.Add(blocks, one)), op.Constant(value_float=growth.beta)), one)
    factor: ir.Value = op.Unsqueeze(op.Cast(grown, to=dtype), [2])
    return factor


class _Layer(ExportModule):
    """Attention and MLP on a residual stream, with the norms that the family has around each."""

    def __init__(
        self,
        spec: DecoderSpec,
        biases: Biases,
        index: int,
        tables: Mapping[str, RotaryTable],
    ) -> None:
        super().__init__()
        self._mixer = "self_attn" if spec.layers[index].mixer == "attention" else "conv"
        if self._mixer == "conv":
            self.conv = ShortConv(spec, has_bias=biases.conv)
        else:
            self.self_attn = Attention(spec, biases, index, tables)
        self.mlp = _mlp(spec, biases, index)
        self._names = spec.norm_names
        for name in filter(None, dict.fromkeys(self._names)):
            setattr(self, name, norm_of(spec, spec.hidden_size))
        self._spec = spec
        # The first layer reads the embedding, in some families the sum of embedding and position.
        self._reads_sum = index > 0 or (bool(spec.learned_positions) and not spec.embedding_norm)

    def forward(
        self, op: OpBuilder, hidden: ir.Value, shared: Shared, past: Carried
    ) -> tuple[ir.Value, Carried]:
        names, factor = self._names, self._spec.residual_scale
        normed = self._normed(op, names.before_attention, hidden)
        attended, present = getattr(self, self._mixer)(op, normed, shared, past)
        added = op.Add(hidden, scaled(op, self._normed(op, names.after_attention, attended), factor))
        if not self._spec.parallel:
            normed = self._normed(op, names.before_mlp, added)
        elif names.before_mlp != names.before_attention:
            normed = self._normed(op, names.before_mlp, hidden)
        transformed = self._normed(op, names.after_mlp, self.mlp(op, normed))
        return op.Add(added, scaled(op, transformed, factor)), present

    def emits(self) -> Counter[Pattern]:
        """A norm in front of a block reads the residual stream; of two that read one sum, one is joined with it."""
        if self._spec.norm not in JOINED_WITH_SUM:
            return Counter()
        first = self._names.before_attention is not None and self._reads_sum
        second = self._names.before_mlp is not None and not self._spec.parallel
        return Counter({SKIP_NORM: first + second})

    def _normed(self, op: OpBuilder, name: str | None, hidden: ir.Value) -> ir.Value:
        return hidden if name is None else getattr(self, name)(op, hidden)


def _mlp(spec: DecoderSpec, biases: Biases, index: int) -> nn.Module:
    if spec.experts is not None and spec.layers[index].has_experts:
        return Mixture(spec, spec.experts)
    return Mlp(spec, has_bias=biases.mlp)

"""The decoder of all families, on ``com.microsoft.GroupQueryAttention``.

Rotation, sliding window and soft cap are inside the operator. Inputs that only one execution provider takes (norm
weights and position ids) are not wired.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import onnx_ir as ir
from mobius import ArchitectureConfig
from mobius.components import FCMLP, MLP, Embedding, LayerNorm, Linear, MoELayer, RMSNorm, SoftmaxTopKGate
from onnxscript import OpBuilder, nn

from rk_export.graph.dense.rotary import Rotary, scaled
from rk_export.graph.dense.short_conv import RowTexts, ShortConv, row_texts
from rk_export.graph.modules.base import ExportModule, Pattern, operators
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.rotary import RotaryTable
from rk_export.passes.graph.nodes import MICROSOFT

ATTENTION = operators("GroupQueryAttention", MICROSOFT, "GroupQueryAttention")
SKIP_NORM = operators(
    "residual sum with norm", MICROSOFT, "SkipSimplifiedLayerNormalization", "SkipLayerNormalization"
)
# What a layer hands on to the next call: keys and values, or the state of a short convolution.
Carried = tuple[ir.Value, ...]


class _Shared(NamedTuple):
    """Values that all layers of a graph use.

    Args:
        last_key: (batch,) int32, index of each row's last key.
        key_count: () int32, keys after this step, of the longest row.
        tables: Name of a rotary table -> cosines, sines, each (positions, rotated width / 2).
        texts: What short convolutions read from the mask; None where no layer has one.
    """

    last_key: ir.Value
    key_count: ir.Value
    tables: Mapping[str, tuple[ir.Value, ir.Value]]
    texts: RowTexts | None


class Decoder(nn.Module):
    """Decoder with output projection: input ids and cache to logits and the longer cache."""

    def __init__(
        self,
        spec: DecoderSpec,
        config: ArchitectureConfig,
        tables: Mapping[str, RotaryTable],
        dtype: ir.DataType,
    ) -> None:
        super().__init__()
        self.model = _DecoderBody(spec, config, tables, dtype)
        self.lm_head = Linear(spec.hidden_size, spec.vocab_size, bias=False)
        if spec.tied:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._logit_scale, self._logit_softcap = spec.logit_scale, spec.logit_softcap

    @property
    def reads_positions(self) -> bool:
        """Whether the graph reads ``position_ids``: positions are learned."""
        return self.model.embed_positions is not None

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
        config: ArchitectureConfig,
        tables: Mapping[str, RotaryTable],
        dtype: ir.DataType,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(spec.vocab_size, spec.hidden_size)
        self.embed_positions = None
        if spec.learned_positions:
            self.embed_positions = Embedding(spec.learned_positions, spec.hidden_size)
        self.layers = nn.ModuleList([_Layer(spec, config, index) for index in range(len(spec.layers))])
        self.norm = _norm(spec, spec.hidden_size)
        self.rotary = {name: Rotary(table, f"rotary_{name}", dtype) for name, table in tables.items()}
        for rotary in self.rotary.values():
            setattr(self, cast(str, rotary.name), rotary)
        self._embedding_scale = spec.embedding_scale
        self._taps, self._dtype = spec.conv_taps, dtype

    def emits(self) -> Counter[Pattern]:
        return Counter({SKIP_NORM: 1})

    def forward(
        self,
        op: OpBuilder,
        input_ids: ir.Value,
        attention_mask: ir.Value,
        position_ids: ir.Value,
        past_key_values: Sequence[Carried],
    ) -> tuple[ir.Value, list[Carried]]:
        hidden = scaled(op, self.embed_tokens(op, input_ids), self._embedding_scale)
        if self.embed_positions is not None:
            hidden = op.Add(hidden, self.embed_positions(op, position_ids))
        shared = self._shared(op, input_ids, attention_mask)
        present = []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            hidden, layer_present = layer(op, hidden, shared, past)
            present.append(layer_present)
        return self.norm(op, hidden), present

    def _shared(self, op: OpBuilder, input_ids: ir.Value, attention_mask: ir.Value) -> _Shared:
        last_key = op.Sub(op.ReduceSum(attention_mask, [1], keepdims=0), op.Constant(value_int=1))
        key_count = op.Gather(op.Shape(attention_mask), op.Constant(value_int=1))
        return _Shared(
            last_key=op.Cast(last_key, to=ir.DataType.INT32),
            key_count=op.Cast(key_count, to=ir.DataType.INT32),
            tables={name: rotary(op, key_count) for name, rotary in self.rotary.items()},
            texts=row_texts(op, input_ids, attention_mask, self._taps, self._dtype) if self._taps else None,
        )


class _Layer(ExportModule):
    """Attention and MLP on a residual stream, with the norms that the family has around each."""

    def __init__(self, spec: DecoderSpec, config: ArchitectureConfig, index: int) -> None:
        super().__init__()
        self.self_attn = self.conv = None
        if spec.layers[index].mixer == "short_conv":
            self.conv = ShortConv(spec)
        else:
            self.self_attn = Attention(spec, config, index)
        self.mlp = _mlp(spec, config, index)
        self._names = spec.norm_names
        for name in filter(None, self._names):
            setattr(self, name, _norm(spec, spec.hidden_size))
        self._residual_scale = spec.residual_scale
        # The first layer reads the embedding, in some families the sum of embedding and position.
        self._reads_sum = index > 0 or bool(spec.learned_positions)

    def forward(
        self, op: OpBuilder, hidden: ir.Value, shared: _Shared, past: Carried
    ) -> tuple[ir.Value, Carried]:
        attended, present = self._mixed(
            op, self._normed(op, self._names.before_attention, hidden), shared, past
        )
        attended = self._normed(op, self._names.after_attention, attended)
        hidden = op.Add(hidden, scaled(op, attended, self._residual_scale))
        transformed = self.mlp(op, self._normed(op, self._names.before_mlp, hidden))
        transformed = self._normed(op, self._names.after_mlp, transformed)
        return op.Add(hidden, scaled(op, transformed, self._residual_scale)), present

    def _mixed(
        self, op: OpBuilder, hidden: ir.Value, shared: _Shared, past: Carried
    ) -> tuple[ir.Value, Carried]:
        """Mix tokens; return what attention or convolution gives, and what the next call needs."""
        if self.conv is None:
            return self.self_attn(op, hidden, shared, past)
        (state,) = past
        output, state = self.conv(op, hidden, shared.texts, state)
        return output, (state,)

    def emits(self) -> Counter[Pattern]:
        """The norms in front of attention and MLP read the residual stream."""
        before_attention = self._names.before_attention is not None and self._reads_sum
        return Counter({SKIP_NORM: before_attention + (self._names.before_mlp is not None)})

    def _normed(self, op: OpBuilder, name: str | None, hidden: ir.Value) -> ir.Value:
        return hidden if name is None else getattr(self, name)(op, hidden)


class Attention(ExportModule):
    """Projections around one GroupQueryAttention node.

    The node rotates queries and keys, appends to the cache and masks: a query sees the keys up to its own
    position, at most ``local_window_size`` of them.
    """

    def __init__(self, spec: DecoderSpec, config: ArchitectureConfig, index: int) -> None:
        super().__init__()
        heads, layer = spec.heads, spec.layers[index]
        rows, kv_rows = heads.heads * heads.head_dim, heads.kv_heads * heads.head_dim
        self.q_proj = Linear(spec.hidden_size, rows, bias=config.attn_qkv_bias)
        self.k_proj = Linear(spec.hidden_size, kv_rows, bias=config.attn_qkv_bias)
        self.v_proj = Linear(spec.hidden_size, kv_rows, bias=config.attn_qkv_bias)
        self.o_proj = Linear(rows, spec.hidden_size, bias=config.attn_o_bias)
        self.q_norm = self.k_norm = None
        if spec.query_key_norm is not None:
            by_head = spec.query_key_norm == "head"
            self.q_norm = _norm(spec, heads.head_dim if by_head else rows)
            self.k_norm = _norm(spec, heads.head_dim if by_head else kv_rows)
        self._norm_width = heads.head_dim if spec.query_key_norm == "head" else None
        self._rotary = layer.rotary
        self._attributes: dict[str, Any] = {
            "num_heads": heads.heads,
            "kv_num_heads": heads.kv_heads,
            "scale": layer.attention_scale,
            "do_rotary": int(layer.rotary is not None),
        }
        if spec.attention_softcap:
            self._attributes["softcap"] = spec.attention_softcap
        if layer.window is not None:
            self._attributes["local_window_size"] = layer.window

    @property
    def takes_products(self) -> bool:
        """Whether the operator reads q, k and v as the projections return them."""
        return self.q_norm is None

    def emits(self) -> Counter[Pattern]:
        return Counter({ATTENTION: 1})

    def forward(
        self, op: OpBuilder, hidden: ir.Value, shared: _Shared, past: Carried
    ) -> tuple[ir.Value, Carried]:
        rotary = () if self._rotary is None else shared.tables[self._rotary]
        attended, key, value = op.GroupQueryAttention(
            self._normed(op, self.q_norm, self.q_proj(op, hidden)),
            self._normed(op, self.k_norm, self.k_proj(op, hidden)),
            self.v_proj(op, hidden),
            *past,
            shared.last_key,
            shared.key_count,
            *rotary,
            _domain="com.microsoft",
            _outputs=3,
            **self._attributes,
        )
        return self.o_proj(op, attended), (key, value)

    def _normed(self, op: OpBuilder, norm: nn.Module | None, states: ir.Value) -> ir.Value:
        if norm is None:
            return states
        if self._norm_width is not None:
            states = op.Reshape(states, [0, 0, -1, self._norm_width])
        normed: ir.Value = norm(op, states)
        return normed if self._norm_width is None else op.Reshape(normed, [0, 0, -1])


def _mlp(spec: DecoderSpec, config: ArchitectureConfig, index: int) -> nn.Module:
    if spec.experts is not None and spec.layers[index].has_experts:
        gate = SoftmaxTopKGate(
            spec.hidden_size,
            spec.experts.count,
            spec.experts.per_token,
            norm_topk_prob=spec.experts.normalized,
        )
        return MoELayer(config, gate=gate)
    if spec.gated_mlp:
        return MLP(config)
    return FCMLP(spec.hidden_size, spec.intermediate_size, spec.activation, bias=config.mlp_bias)


def _norm(spec: DecoderSpec, width: int) -> nn.Module:
    norm_class = RMSNorm if spec.norm == "rms" else LayerNorm
    return norm_class(width, eps=spec.norm_epsilon)

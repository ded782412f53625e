"""The dense graph of a model, built from mobius' components; the only module that imports mobius.

``build_module`` returns a tree of onnxscript modules that the exporter may edit, ``trace`` turns it into an
``ir.Model``. All decoder families run through the one decoder below, on ``com.microsoft.GroupQueryAttention``
with rotation, sliding window and soft cap inside the operator; BERT uses ``MultiHeadAttention``.

``cpu`` graphs are fp32. ``cuda`` and ``portable`` graphs are fp16 and use the same operators: inputs that
only one provider takes (norm weights and position ids of GroupQueryAttention) are not wired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import onnx_ir as ir
import torch
from mobius import ArchitectureConfig, build_from_module
from mobius.components import FCMLP, MLP, Embedding, LayerNorm, Linear, MoELayer, RMSNorm, SoftmaxTopKGate
from mobius.models.bert import BertModel
from onnxscript import OpBuilder, nn
from transformers import PretrainedConfig, PreTrainedModel

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.model.decoder_spec import DecoderSpec, activation_of, check_options
from rk_export.model.description import ModelDescription
from rk_export.model.exported_names import rename_tensors
from rk_export.model.families import Architecture
from rk_export.model.rotary import RotaryTable, rotary_tables

ExecutionProvider = Literal["cpu", "cuda", "portable"]
Dtype = Literal["fp32", "fp16"]
Cache = tuple[ir.Value, ir.Value]

_DTYPE_OF: dict[str, str] = {"cpu": "fp32", "cuda": "fp16", "portable": "fp16"}
_MOBIUS_EP: dict[str, str] = {"cpu": "cpu", "cuda": "cuda", "portable": "cuda"}
BATCH = "batch_size"
_IR_DTYPE = {"fp32": ir.DataType.FLOAT, "fp16": ir.DataType.FLOAT16}


@dataclass
class OnnxModule:
    """A model as a tree of onnxscript modules, not traced yet.

    Args:
        module: The tree; replace a linear by assigning to its parent's attribute before ``trace``.
        config: mobius' config.
        task: mobius' task: the inputs and outputs of the graph.
        ep: ``cpu``, ``cuda`` or ``portable``.
        architecture: Names of the family.
    """

    module: nn.Module
    config: ArchitectureConfig
    task: str
    ep: str
    architecture: Architecture


def check_supported(description: ModelDescription, *, ep: str, dtype: str) -> None:
    """Refuse, before any weight is read, every model whose export would not be exact.

    Raises:
        UnsupportedModelError: The family, one of its options, or the dtype for this execution provider.
    """
    build_module(description, ep=cast(ExecutionProvider, ep), dtype=cast(Dtype, dtype))


def build_module(
    description: ModelDescription, *, ep: ExecutionProvider, dtype: Dtype, positions: int | None = None
) -> OnnxModule:
    """Build the module tree of a model; weights have shapes only.

    Args:
        description: Of the model.
        ep: The execution provider.
        dtype: The graph's floats.
        positions: The longest sequence; None takes the config's.

    Raises:
        UnsupportedModelError: As ``check_supported``.
    """
    config, architecture = description.config, description.architecture
    _check_dtype(ep, dtype)
    check_options(config)
    skeleton = description.canonical
    shapes = _weight_shapes(architecture, skeleton)
    if architecture.is_encoder:
        onnx_config, task = _encoder_config(config), "feature-extraction"
        module: nn.Module = _Encoder(onnx_config)
    else:
        spec = description.decoder
        onnx_config, task = _decoder_config(spec, shapes), "text-generation"
        module = _Decoder(spec, onnx_config, _tables(spec, skeleton, positions), _IR_DTYPE[dtype])
    _check_structure(module, shapes)
    onnx_config.dtype = _IR_DTYPE[dtype]
    return OnnxModule(module, onnx_config, task, ep, architecture)


def trace(onnx_module: OnnxModule) -> ir.Model:
    """Trace the module tree and run mobius' graph optimizations; weights have no values yet.

    Parameters become part of the graph: build a new module tree to trace again.

    Returns:
        Decoder: inputs ``input_ids``, ``attention_mask``, ``past_key_values.{i}.key|value`` and, with learned
        positions, ``position_ids``; outputs ``logits``, ``present.{i}.key|value``. Encoder: inputs
        ``input_ids``, ``attention_mask``, ``token_type_ids``; output ``last_hidden_state``.
    """
    package = build_from_module(
        onnx_module.module,
        onnx_module.config,
        onnx_module.task,
        execution_provider=_MOBIUS_EP[onnx_module.ep],
    )
    model = cast(ir.Model, package["model"])
    for parameter in onnx_module.module.parameters():
        if isinstance(parameter, _Late):
            model.graph.initializers[parameter.name].const_value = parameter.late
    _name_batch(model)
    return model


def _name_batch(model: ir.Model) -> None:
    """Call the first dimension what transformers.js looks for: it makes its first cache from names of dimensions."""
    produced = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *produced):
        if value.shape is not None:
            dims = [BATCH if str(dim) == "batch" else dim for dim in value.shape]
            value.shape = ir.Shape(dims)


def rename_weights(
    onnx_module: OnnxModule, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Map canonical torch tensors to initializers of the traced graph; see ``rename_tensors``."""
    tied = bool(onnx_module.config.tie_word_embeddings)
    return rename_tensors(onnx_module.architecture, state_dict, tied=tied)


def float_type(dtype: Dtype) -> ir.DataType:
    """Return the graph's type of floats."""
    return _IR_DTYPE[dtype]


def linear_class() -> type[nn.Module]:
    """Return the class of the module tree's linears: ``weight`` (out, in), ``bias`` (out) or None."""
    return cast("type[nn.Module]", Linear)


def _check_dtype(ep: str, dtype: str) -> None:
    if _DTYPE_OF.get(ep) != dtype:
        raise UnsupportedModelError(
            f"no export in {dtype} for the execution provider {ep!r}",
            where="ep, dtype",
            fix="use one of " + ", ".join(f"{name} with {kind}" for name, kind in _DTYPE_OF.items()),
        )


def _weight_shapes(architecture: Architecture, skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return initializer name -> shape of all weights that the torch model has."""
    tied = architecture.lm_head is not None and bool(skeleton.config.tie_word_embeddings)
    try:
        renamed = rename_tensors(architecture, skeleton.state_dict(), tied=tied)
    except InputError as error:
        raise UnsupportedModelError(
            f"the config asks for weights that are not exported: {error.what}",
            where="config.json",
            fix="use a model of the family without that option",
        ) from error
    return {name: tuple(tensor.shape) for name, tensor in renamed.items()}


def _tables(spec: DecoderSpec, skeleton: PreTrainedModel, positions: int | None) -> dict[str, RotaryTable]:
    if spec.learned_positions:
        return {}
    rows = positions or int(skeleton.config.max_position_embeddings)
    return rotary_tables(skeleton.config, type(skeleton.get_submodule("model.rotary_emb")), rows)


def _decoder_config(spec: DecoderSpec, shapes: Mapping[str, tuple[int, ...]]) -> ArchitectureConfig:
    """Return what mobius' components and task read; biases are those the torch model has."""
    experts = spec.experts

    def has_bias(*linears: str) -> bool:
        return any(name.endswith(tuple(f"{linear}.bias" for linear in linears)) for name in shapes)

    return ArchitectureConfig(
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=len(spec.layers),
        num_attention_heads=spec.heads.heads,
        num_key_value_heads=spec.heads.kv_heads,
        head_dim=spec.heads.head_dim,
        hidden_act=spec.activation,
        rms_norm_eps=spec.norm_epsilon,
        attn_qkv_bias=has_bias("self_attn.q_proj"),
        attn_o_bias=has_bias("self_attn.o_proj"),
        mlp_bias=has_bias("mlp.up_proj"),
        tie_word_embeddings=spec.tied,
        num_local_experts=experts and experts.count,
        num_experts_per_tok=experts and experts.per_token,
        moe_intermediate_size=experts and experts.intermediate_size,
    )


def _encoder_config(config: PretrainedConfig) -> ArchitectureConfig:
    return ArchitectureConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        type_vocab_size=config.type_vocab_size,
        hidden_act=activation_of(config),
        rms_norm_eps=config.layer_norm_eps,
        pad_token_id=config.pad_token_id,
    )


def _check_structure(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the parameters with the torch model's: one that is missing would be dropped silently."""
    built = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if parameter.const_value is None and not isinstance(parameter, _Late)
    }
    if built.get("lm_head.weight") and "lm_head.weight" not in shapes:
        del built["lm_head.weight"]  # tied: the same parameter is listed as the embedding
    differing = sorted(name for name, _ in built.items() ^ shapes.items())
    if differing:
        raise UnsupportedModelError(
            f"the exported graph would have other weights than the torch model: {', '.join(differing[:5])}",
            where="config.json",
            fix="report the config: an option of it is not known to this exporter",
        )


class _Shared(NamedTuple):
    """Values that all layers of a graph use.

    Args:
        last_key: (batch,) int32, index of each row's last key.
        key_count: () int32, keys after this step, of the longest row.
        tables: Name of a rotary table -> cosines, sines, each (positions, rotated width / 2).
    """

    last_key: ir.Value
    key_count: ir.Value
    tables: Mapping[str, tuple[ir.Value, ir.Value]]


class _Decoder(nn.Module):
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

    def forward(
        self,
        op: OpBuilder,
        input_ids: ir.Value,
        attention_mask: ir.Value,
        position_ids: ir.Value,
        past_key_values: Sequence[Cache],
    ) -> tuple[ir.Value, list[Cache]]:
        hidden, present = self.model(op, input_ids, attention_mask, position_ids, past_key_values)
        logits = _scaled(op, self.lm_head(op, hidden), self._logit_scale)
        if self._logit_softcap:
            capped = op.Tanh(op.Div(logits, self._logit_softcap))
            logits = op.Mul(capped, self._logit_softcap)
        return logits, present


class _DecoderBody(nn.Module):
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
        self.rotary = {name: _Rotary(table, f"rotary_{name}", dtype) for name, table in tables.items()}
        for rotary in self.rotary.values():
            setattr(self, cast(str, rotary.name), rotary)
        self._embedding_scale = spec.embedding_scale

    def forward(
        self,
        op: OpBuilder,
        input_ids: ir.Value,
        attention_mask: ir.Value,
        position_ids: ir.Value,
        past_key_values: Sequence[Cache],
    ) -> tuple[ir.Value, list[Cache]]:
        hidden = _scaled(op, self.embed_tokens(op, input_ids), self._embedding_scale)
        if self.embed_positions is not None:
            hidden = op.Add(hidden, self.embed_positions(op, position_ids))
        shared = self._shared(op, attention_mask)
        present = []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            hidden, layer_present = layer(op, hidden, shared, past)
            present.append(layer_present)
        return self.norm(op, hidden), present

    def _shared(self, op: OpBuilder, attention_mask: ir.Value) -> _Shared:
        last_key = op.Sub(op.ReduceSum(attention_mask, [1], keepdims=0), op.Constant(value_int=1))
        key_count = op.Gather(op.Shape(attention_mask), op.Constant(value_int=1))
        return _Shared(
            last_key=op.Cast(last_key, to=ir.DataType.INT32),
            key_count=op.Cast(key_count, to=ir.DataType.INT32),
            tables={name: rotary(op, key_count) for name, rotary in self.rotary.items()},
        )


class _Layer(nn.Module):
    """Attention and MLP on a residual stream, with the norms that the family has around each."""

    def __init__(self, spec: DecoderSpec, config: ArchitectureConfig, index: int) -> None:
        super().__init__()
        self.self_attn = _Attention(spec, config, index)
        self.mlp = _mlp(spec, config, index)
        self._names = spec.norm_names
        for name in filter(None, self._names):
            setattr(self, name, _norm(spec, spec.hidden_size))
        self._residual_scale = spec.residual_scale

    def forward(
        self, op: OpBuilder, hidden: ir.Value, shared: _Shared, past: Cache
    ) -> tuple[ir.Value, Cache]:
        attended, present = self.self_attn(
            op, self._normed(op, self._names.before_attention, hidden), shared, past
        )
        attended = self._normed(op, self._names.after_attention, attended)
        hidden = op.Add(hidden, _scaled(op, attended, self._residual_scale))
        transformed = self.mlp(op, self._normed(op, self._names.before_mlp, hidden))
        transformed = self._normed(op, self._names.after_mlp, transformed)
        return op.Add(hidden, _scaled(op, transformed, self._residual_scale)), present

    def _normed(self, op: OpBuilder, name: str | None, hidden: ir.Value) -> ir.Value:
        return hidden if name is None else getattr(self, name)(op, hidden)


class _Attention(nn.Module):
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

    def forward(
        self, op: OpBuilder, hidden: ir.Value, shared: _Shared, past: Cache
    ) -> tuple[ir.Value, Cache]:
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


class _Late(nn.Parameter):
    """A constant that gets its value after tracing, so that the tracing folds nothing that is computed from it."""

    def __init__(self, value: np.ndarray) -> None:
        self.late = ir.tensor(value)
        super().__init__(value.shape, dtype=self.late.dtype)
        self._keep_float32 = True  # read by mobius: angles in half precision are no angles


class _Rotary(nn.Module):
    """Rotary tables, computed from frequencies.

    All inputs are constants: ONNX Runtime computes the tables once, when it loads the graph. They would take
    megabytes of the file (33 for 131,072 positions of a head of width 64), the frequencies take bytes.
    """

    def __init__(self, table: RotaryTable, name: str, dtype: ir.DataType) -> None:
        super().__init__(name)
        self._scale, self._long_from, self._dtype = table.scale, table.long_from, dtype
        self._parts = []
        for part, prefix in zip(table.parts, ("", "long_"), strict=False):
            rows, frequencies = _Late(np.array(part.rows)), _Late(part.frequencies[None])
            setattr(self, f"{prefix}rows", rows)
            setattr(self, f"{prefix}frequencies", frequencies)
            self._parts.append((rows, frequencies))

    def forward(self, op: OpBuilder, key_count: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return cosines and sines (positions, width) for a sequence of ``key_count`` tokens, () int64."""
        cos_cache, sin_cache = self._tables(op)
        if self._long_from is None:
            return cos_cache, sin_cache
        short_rows = op.Constant(value_ints=[self._long_from])
        count = op.Reshape(key_count, [1])
        is_long = op.Cast(op.Greater(count, short_rows), to=ir.DataType.INT64)
        start = op.Mul(is_long, short_rows)
        end = op.Add(start, count)
        return op.Slice(cos_cache, start, end, [0]), op.Slice(sin_cache, start, end, [0])

    def _tables(self, op: OpBuilder) -> tuple[ir.Value, ir.Value]:
        """Return all cosines and all sines, the parts below each other."""
        angles = [op.Mul(_positions(op, rows), frequencies) for rows, frequencies in self._parts]
        below = angles[0] if len(angles) == 1 else op.Concat(*angles, axis=0)
        cos, sin = (_scaled(op, waves, self._scale) for waves in (op.Cos(below), op.Sin(below)))
        if self._dtype is ir.DataType.FLOAT:
            return cos, sin
        return op.Cast(cos, to=self._dtype), op.Cast(sin, to=self._dtype)


def _positions(op: OpBuilder, rows: ir.Value) -> ir.Value:
    """Return the positions (rows, 1), float32, which holds whole numbers up to 2**24."""
    whole = op.Range(op.Constant(value_int=0), rows, op.Constant(value_int=1))
    positions: ir.Value = op.Unsqueeze(op.Cast(whole, to=ir.DataType.FLOAT), [1])
    return positions


class _Encoder(BertModel):
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


def _scaled(op: OpBuilder, value: ir.Value, factor: float) -> ir.Value:
    return value if factor == 1.0 else op.Mul(value, factor)

"""The dense graph of a model: config to a tree of onnxscript modules, the tree to an ``ir.Model``.

``build_module`` returns a tree that the exporter may edit, ``trace`` turns it into a graph. All decoder families
run through the one decoder of ``decoder.py``, all encoders through ``encoder.py``. ``cpu`` graphs are fp32, ``cuda``
and ``portable`` graphs are fp16 and use the same operators.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import onnx_ir as ir
import torch
from mobius import ArchitectureConfig, ModelTask, build_from_module
from onnxscript import nn
from transformers import PretrainedConfig, PreTrainedModel

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.graph.dense.attention import Biases
from rk_export.graph.dense.decoder import Decoder
from rk_export.graph.dense.encoder import Encoder
from rk_export.graph.dense.encoder_task import EncoderTask
from rk_export.graph.dense.rotary import Late
from rk_export.graph.dense.stateful_task import StatefulTextGeneration
from rk_export.model.architecture import Architecture
from rk_export.model.context import own_context
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.description import ModelDescription
from rk_export.model.encoder_spec import EncoderSpec
from rk_export.model.exported_names import rename_tensors

ExecutionProvider = Literal["cpu", "cuda", "portable"]
Dtype = Literal["fp32", "fp16"]

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
    task: str | ModelTask
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
    architecture = description.architecture
    _check_dtype(ep, dtype)
    # Specs refuse options by name, before the torch model is built.
    spec = description.spec
    skeleton = description.canonical
    shapes = _weight_shapes(architecture, skeleton)
    dtypes = _IR_DTYPE[dtype]
    task: str | ModelTask
    tables = description.rotary_tables(positions or own_context(description.config))
    if isinstance(spec, EncoderSpec):
        onnx_config, task = _encoder_config(spec), EncoderTask()
        biased = {name.removesuffix(".bias") for name in shapes if name.endswith(".bias")}
        module: nn.Module = Encoder(spec, biased, tables, dtypes)
    else:
        onnx_config = _decoder_config(spec)
        task = StatefulTextGeneration(spec) if spec.conv_layers else "text-generation"
        biases = _biases(shapes)
        _check_head(spec, biases, description.config)
        module = Decoder(spec, biases, tables, dtypes)
    _check_structure(module, shapes)
    onnx_config.dtype = dtypes
    return OnnxModule(module, onnx_config, task, ep, architecture)


def trace(onnx_module: OnnxModule) -> ir.Model:
    """Trace the module tree and run mobius' graph optimizations; weights have no values yet.

    Parameters become part of the graph: build a new module tree to trace again.

    Returns:
        Decoder: inputs ``input_ids``, ``attention_mask``, ``past_key_values.{i}.key|value`` and, with learned
        positions, ``position_ids``; outputs ``logits``, ``present.{i}.key|value``. A layer with a short convolution has
        ``past_conv.{i}`` and ``present_conv.{i}`` instead. Encoder: inputs ``input_ids``, ``attention_mask`` and, with
        several types of tokens, ``token_type_ids``; output ``last_hidden_state``, or ``logits`` of a classifier.
    """
    package = build_from_module(
        onnx_module.module,
        onnx_module.config,
        onnx_module.task,
        execution_provider=_MOBIUS_EP[onnx_module.ep],
    )
    model = cast(ir.Model, package["model"])
    for parameter in onnx_module.module.parameters():
        if isinstance(parameter, Late):
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


def _decoder_config(spec: DecoderSpec) -> ArchitectureConfig:
    """Return what mobius' task reads."""
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
        tie_word_embeddings=spec.tied,
    )


def _biases(shapes: Mapping[str, tuple[int, ...]]) -> Biases:
    """Return which matrices have biases, as the torch model has them."""

    def has_bias(linear: str) -> bool:
        return any(name.endswith(f"{linear}.bias") for name in shapes)

    return Biases(
        query_key_value=has_bias("self_attn.q_proj"),
        output=has_bias("self_attn.o_proj"),
        mlp=has_bias("mlp.up_proj"),
        head=has_bias("lm_head"),
        conv=has_bias("conv.in_proj"),
    )


def _check_head(spec: DecoderSpec, biases: Biases, config: PretrainedConfig) -> None:
    """Refuse an output projection that shares its matrix and has a bias of its own: no known model has one."""
    if spec.tied and biases.head:
        fields = [name for name in ("tie_word_embeddings", "use_bias") if hasattr(config, name)]
        raise UnsupportedModelError(
            "tie_word_embeddings=True: an output projection with a bias is exported with a matrix of its own only",
            where=f"config.json: {', '.join(fields)}",
            fix="store the output projection, and state false",
        )


def _encoder_config(spec: EncoderSpec) -> ArchitectureConfig:
    """Return what mobius checks; the encoder's modules read its spec."""
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
    )


def _check_structure(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compare the parameters with the torch model's: one that is missing would be dropped silently."""
    built = {
        name: tuple(parameter.shape)
        for name, parameter in module.named_parameters()
        if parameter.const_value is None and not isinstance(parameter, Late)
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

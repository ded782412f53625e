"""Model families: where each keeps its weight matrices, in PyTorch and in the exported graph.

All decoders are exported with the module names of Llama; an ``Architecture`` holds the torch names besides.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.model.canonical import Experts, linear_from_conv1d, split_experts, split_linear

Role = Literal["q", "k", "v", "o", "gate", "up", "down", "expert"]
RolePaths = tuple[tuple[Role, str], ...]

ATTENTION: RolePaths = (
    ("q", "self_attn.q_proj"),
    ("k", "self_attn.k_proj"),
    ("v", "self_attn.v_proj"),
    ("o", "self_attn.o_proj"),
)
GATED_MLP: RolePaths = (("gate", "mlp.gate_proj"), ("up", "mlp.up_proj"), ("down", "mlp.down_proj"))


@dataclass(frozen=True)
class HeadLayout:
    """Attention heads of a layer: query heads, key/value heads and the width of one."""

    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class Projection:
    """One weight matrix that may be rewritten.

    Args:
        role: What it computes.
        path: Torch path relative to the layer in canonical form; an ``nn.Linear``, weight (out, in).
        onnx_path: Path of the linear module relative to the exported layer module.
    """

    role: Role
    path: str
    onnx_path: str


@dataclass(frozen=True)
class Architecture:
    """Names of one model family.

    Args:
        model_type: ``config.model_type``.
        layers: Torch path of the list of layers.
        embedding: Torch path of the token embedding.
        lm_head: Torch path of the output projection; None for encoders.
        onnx_layers: Path of the list of layers in the exported module.
        onnx_embedding: Path of the token embedding in the exported module.
        onnx_lm_head: Path of the output projection in the exported module; None for encoders.
        is_encoder: True for a bidirectional encoder, exported as feature extraction.
        attention: Rewritable attention matrices: role and torch path in canonical form.
        mlp: Rewritable matrices of a dense MLP; experts are listed by ``projections``.
        renamed: Torch path -> exported path, within a layer, of every module where the two differ.
        outer: Torch path -> exported path of the modules outside the layers, embedding and head included.
        unused: Torch paths of modules that the exported model does not have.
        unit_offset: Its norms store their gain minus one.
        rewrite: Brings one layer into canonical form, in place.
    """

    model_type: str
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    lm_head: str | None = "lm_head"
    onnx_layers: str = "model.layers"
    onnx_embedding: str = "model.embed_tokens"
    onnx_lm_head: str | None = "lm_head"
    is_encoder: bool = False
    attention: RolePaths = ATTENTION
    mlp: RolePaths = GATED_MLP
    renamed: Mapping[str, str] = field(default_factory=dict)
    outer: Mapping[str, str] = field(default_factory=lambda: {"model.norm": "model.norm"})
    unused: tuple[str, ...] = ()
    unit_offset: bool = False
    rewrite: Callable[[nn.Module], None] | None = None

    def projections(self, config: PretrainedConfig, layer_index: int) -> tuple[Projection, ...]:
        """Return the rewritable matrices of layer ``layer_index``, in the order of the forward pass."""
        mlp = _expert_paths(config) if has_experts(config, layer_index) else self.mlp
        return tuple(Projection(role, path, self.onnx_path(path)) for role, path in self.attention + mlp)

    def onnx_path(self, path: str) -> str:
        """Return the exported path of a torch path, both relative to the layer."""
        for torch_path, onnx_path in self.renamed.items():
            if path == torch_path or path.startswith(f"{torch_path}."):
                return onnx_path + path[len(torch_path) :]
        return path

    def canonicalize(self, layer: nn.Module) -> None:
        """Bring a torch layer into canonical form, in place; its function does not change.

        Joined matrices become separate ``nn.Linear`` children, ``Conv1D`` becomes ``nn.Linear``, stacked
        experts become one module each. Works on meta tensors; a second call changes nothing.
        """
        if self.rewrite is not None:
            self.rewrite(layer)


def architecture_of(config: PretrainedConfig) -> Architecture:
    """Return the family of a config.

    Raises:
        UnsupportedModelError: The family is unknown; the message lists the known ones.
    """
    architecture = _ARCHITECTURES.get(config.model_type)
    if architecture is None:
        raise UnsupportedModelError(
            f"the model type {config.model_type!r} is not supported",
            where="config.json: model_type",
            fix=f"use one of {', '.join(sorted(_ARCHITECTURES))}",
        )
    return architecture


def heads_of(config: PretrainedConfig) -> HeadLayout:
    """Return the attention heads of a model, the same in every layer."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return HeadLayout(heads, kv_heads, head_dim)


def has_experts(config: PretrainedConfig, layer_index: int) -> bool:
    """Return whether the MLP of layer ``layer_index`` is a mixture of experts."""
    if config.model_type == "qwen3_moe":
        sparse = (layer_index + 1) % config.decoder_sparse_step == 0
        return sparse and layer_index not in config.mlp_only_layers
    return bool(config.model_type == "mixtral")


def empty_model(config: PretrainedConfig, auto: Any = None) -> PreTrainedModel:
    """Build the torch model without memory for weights: parameters on the meta device, buffers real.

    Decoders are built by ``AutoModelForCausalLM``, encoders by ``AutoModel``; layers keep Hugging Face's form.

    Args:
        config: Of a supported family, or of any that `auto` builds.
        auto: One of transformers' auto classes, for what is neither decoder nor encoder.

    Raises:
        InputError: As `transformers_model`.
        UnsupportedModelError: The family is unknown.
    """
    with _parameters_on_meta():
        return transformers_model(config, auto).eval()


def transformers_model(config: PretrainedConfig, auto: Any = None) -> PreTrainedModel:
    """Build transformers' class of a config, float32, without giving its parameters values.

    Args:
        config, auto: As `empty_model`.

    Raises:
        InputError: A field has a value that the class cannot be built with.
        UnsupportedModelError: The family is unknown.
    """
    if auto is None:
        auto = AutoModel if architecture_of(config).is_encoder else AutoModelForCausalLM
    try:
        with no_init_weights():
            model: PreTrainedModel = auto.from_config(
                copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False
            )
    except Exception as error:  # the classes check little: a wrong value raises whatever its first use does
        raise InputError(
            f"transformers builds no {config.model_type} model from it: {_reason(config, error)}",
            where="config.json",
            fix="correct the value, or update transformers if it is one of a later version",
        ) from error
    return model


def _reason(config: PretrainedConfig, error: Exception) -> str:
    """Return what went wrong, with the fields that hold the value where it is an unknown name."""
    if isinstance(error, KeyError) and error.args:
        fields = [name for name, value in config.to_dict().items() if _holds(value, error.args[0])]
        if fields:
            return f"{error.args[0]!r} in {' and '.join(fields)} is nothing that it knows"
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _holds(value: object, searched: object) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value == searched or any(_holds(part, searched) for part in parts)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Create parameters on the meta device, but buffers for real: rotary tables are computed, not stored.

    ``torch.device("meta")`` would leave those without values. accelerate's ``init_empty_weights`` does the same as
    this and would be one more package to install for it.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _expert_paths(config: PretrainedConfig) -> RolePaths:
    names = ("gate_proj", "up_proj", "down_proj")
    return tuple(
        ("expert", f"mlp.experts.{i}.{name}") for i in range(config.num_local_experts) for name in names
    )


def _split_phi3(layer: nn.Module) -> None:
    attention, mlp = layer.get_submodule("self_attn"), layer.get_submodule("mlp")
    if isinstance(attention.qkv_proj, nn.Linear):
        rows = attention.qkv_proj.out_features
        kv_rows = cast(int, attention.num_key_value_heads) * cast(int, attention.head_dim)
        parts = {"q_proj": rows - 2 * kv_rows, "k_proj": kv_rows, "v_proj": kv_rows}
        attention.qkv_proj = split_linear(attention.qkv_proj, parts)
    if isinstance(mlp.gate_up_proj, nn.Linear):
        half = mlp.gate_up_proj.out_features // 2
        mlp.gate_up_proj = split_linear(mlp.gate_up_proj, {"gate_proj": half, "up_proj": half})


def _split_gpt2(layer: nn.Module) -> None:
    for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        module = layer.get_submodule(path)
        if isinstance(module, Conv1D):
            layer.set_submodule(path, linear_from_conv1d(module))
    joined = layer.get_submodule("attn.c_attn")
    if isinstance(joined, nn.Linear):
        third = joined.out_features // 3
        parts = {"q_proj": third, "k_proj": third, "v_proj": third}
        layer.set_submodule("attn.c_attn", split_linear(joined, parts))


def _split_moe(layer: nn.Module) -> None:
    mlp = layer.get_submodule("mlp")
    experts = getattr(mlp, "experts", None)
    if isinstance(experts, nn.Module) and not isinstance(experts, Experts):
        mlp.experts = split_experts(experts)


_PHI3 = Architecture(
    "phi3",
    attention=(
        ("q", "self_attn.qkv_proj.q_proj"),
        ("k", "self_attn.qkv_proj.k_proj"),
        ("v", "self_attn.qkv_proj.v_proj"),
        ("o", "self_attn.o_proj"),
    ),
    mlp=(
        ("gate", "mlp.gate_up_proj.gate_proj"),
        ("up", "mlp.gate_up_proj.up_proj"),
        ("down", "mlp.down_proj"),
    ),
    renamed={"self_attn.qkv_proj": "self_attn", "mlp.gate_up_proj": "mlp"},
    rewrite=_split_phi3,
)
_STARCODER2 = Architecture(
    "starcoder2",
    mlp=(("up", "mlp.c_fc"), ("down", "mlp.c_proj")),
    renamed={"mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"},
)
_GPT2 = Architecture(
    "gpt2",
    layers="transformer.h",
    embedding="transformer.wte",
    attention=(
        ("q", "attn.c_attn.q_proj"),
        ("k", "attn.c_attn.k_proj"),
        ("v", "attn.c_attn.v_proj"),
        ("o", "attn.c_proj"),
    ),
    mlp=(("up", "mlp.c_fc"), ("down", "mlp.c_proj")),
    renamed={
        "attn.c_attn": "self_attn",
        "attn.c_proj": "self_attn.o_proj",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
    },
    outer={"transformer.wpe": "model.embed_positions", "transformer.ln_f": "model.norm"},
    rewrite=_split_gpt2,
)
_OPT = Architecture(
    "opt",
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    attention=(*ATTENTION[:3], ("o", "self_attn.out_proj")),
    mlp=(("up", "fc1"), ("down", "fc2")),
    renamed={
        "self_attn.out_proj": "self_attn.o_proj",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
        "self_attn_layer_norm": "input_layernorm",
        "final_layer_norm": "post_attention_layernorm",
    },
    outer={
        "model.decoder.embed_positions": "model.embed_positions",
        "model.decoder.final_layer_norm": "model.norm",
    },
)
_BERT = Architecture(
    "bert",
    layers="encoder.layer",
    embedding="embeddings.word_embeddings",
    lm_head=None,
    onnx_layers="encoder.layer",
    onnx_embedding="embeddings.word_embeddings",
    onnx_lm_head=None,
    is_encoder=True,
    attention=(("q", "attention.self.query"), ("k", "attention.self.key")),
    mlp=(),
    renamed={
        "attention.self": "attention",
        "attention.output": "attention",
        "output.dense": "dense",
        "output.LayerNorm": "LayerNorm",
    },
    outer={"embeddings": "embeddings"},
    unused=("pooler",),
)
_LLAMA_NAMED = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "olmo2",
    "granite",
    "smollm3",
)
_ARCHITECTURES: dict[str, Architecture] = {
    architecture.model_type: architecture
    for architecture in (
        *(Architecture(model_type) for model_type in _LLAMA_NAMED),
        *(Architecture(model_type, unit_offset=True) for model_type in ("gemma2", "gemma3_text")),
        *(Architecture(model_type, rewrite=_split_moe) for model_type in ("mixtral", "qwen3_moe")),
        _PHI3,
        _STARCODER2,
        _GPT2,
        _OPT,
        _BERT,
    )
}

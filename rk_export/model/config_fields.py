"""Facts that most families state in fields of the same names, and the spec of a plain Llama made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.model.architecture import HeadLayout
from rk_export.model.decoder_spec import DecoderSpec, LayerSpec
from rk_export.model.rotary import ALL_LAYERS, rotary_parameters

# Checked against PyTorch; the names are those of transformers' ACT2FN.
EXACT_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "relu2")
_ACTIVATION_FIELDS = ("hidden_act", "hidden_activation", "activation_function", "activation")
# Two names of one function.
_SAME_ACTIVATION = {"gelu_fast": "gelu_new"}


def number(config: PretrainedConfig, field: str) -> float:
    """Return a number that the config states; transformers' classes take some fields as they come.

    Args:
        config: Of the model.
        field: Its name; with a dot, an entry of a field.

    Raises:
        InputError: It states none, or something else.
    """
    name, _, entry = field.partition(".")
    value = getattr(config, name, None)
    if entry:
        value = (value or {}).get(entry)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(
            f"{field} is {value!r}, and no number",
            where="config.json",
            fix="give the number that the weights were made with",
        )
    return float(value)


def plain_heads(config: PretrainedConfig) -> HeadLayout:
    """Return the attention heads of a model, the same in every layer."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return HeadLayout(heads, kv_heads, head_dim)


def activation_of(config: PretrainedConfig, fields: Sequence[str] = _ACTIVATION_FIELDS) -> str:
    """Return the name of the MLP's activation.

    Args:
        config: Of the model.
        fields: Where it may stand; the first that is given counts.

    Raises:
        UnsupportedModelError: The activation is not known to be exact in the exported graph.
    """
    field = next(name for name in fields if getattr(config, name, None) is not None)
    stated = str(getattr(config, field))
    activation = _SAME_ACTIVATION.get(stated, stated)
    if activation not in EXACT_ACTIVATIONS:
        raise UnsupportedModelError(
            f"the activation {activation!r} is not supported",
            where=f"config.json: {field}",
            fix=f"use a model with one of {', '.join(EXACT_ACTIVATIONS)}",
        )
    return activation


def every_window(config: PretrainedConfig, index: int) -> int | None:
    """Return the window of a family that has the same in all layers, or none.

    Raises:
        InputError: It holds no token.
    """
    if config.sliding_window is None:
        return None
    window = int(number(config, "sliding_window"))
    if window < 1:
        raise InputError(
            f"sliding_window is {window}: a token sees itself at least",
            where="config.json",
            fix="state null where there is no window",
        )
    return window


def window_by_type(config: PretrainedConfig, index: int) -> int | None:
    """Return the window of a layer where ``layer_types`` says which layers have one."""
    return every_window(config, index) if config.layer_types[index] == "sliding_attention" else None


def no_window(config: PretrainedConfig, index: int) -> int | None:
    """Return None: every layer sees all keys before it."""
    return None


def rotary_table(config: PretrainedConfig, index: int) -> str:
    """Return the name of the rotary table of a layer."""
    return ALL_LAYERS if None in rotary_parameters(config) else str(config.layer_types[index])


def layer_specs(
    config: PretrainedConfig,
    *,
    scale: float | None = None,
    window: Callable[[PretrainedConfig, int], int | None] = no_window,
    rotary: Callable[[PretrainedConfig, int], str | None] = rotary_table,
    has_experts: Callable[[PretrainedConfig, int], bool] | None = None,
) -> tuple[LayerSpec, ...]:
    """Return what differs from layer to layer.

    Args:
        config: Of the model.
        scale: Factor on the dot products of queries and keys; None = 1 over the root of the head's width.
        window: Gives the window of a layer.
        rotary: Gives the name of a layer's rotary table, None where nothing is rotated.
        has_experts: Whether a layer has a mixture of experts; None = none has.
    """
    factor = plain_heads(config).head_dim ** -0.5 if scale is None else scale
    return tuple(
        LayerSpec(
            attention_scale=float(factor),
            window=window(config, index),
            rotary=rotary(config, index),
            has_experts=has_experts is not None and has_experts(config, index),
        )
        for index in range(config.num_hidden_layers)
    )


def llama_spec(config: PretrainedConfig, **changes: Any) -> DecoderSpec:
    """Return the spec of a decoder that is a Llama but for some changes.

    Args:
        config: Of the model; a field whose fact is among the changes is not read.
        **changes: Fields of `DecoderSpec`.

    Raises:
        InputError: A field that it needs holds no number.
        UnsupportedModelError: The config asks for an activation that the graph does not have.
    """
    read: dict[str, Callable[[], Any]] = {
        "heads": lambda: plain_heads(config),
        "layers": lambda: layer_specs(config),
        "vocab_size": lambda: int(config.vocab_size),
        "hidden_size": lambda: int(config.hidden_size),
        "intermediate_size": lambda: int(config.intermediate_size),
        "activation": lambda: activation_of(config),
        "norm_epsilon": lambda: number(config, "rms_norm_eps"),
        "tied": lambda: bool(config.tie_word_embeddings),
    }
    return DecoderSpec(**{name: value() for name, value in read.items() if name not in changes}, **changes)

"""What a decoder computes, read from its Hugging Face config: one frozen value the graph is built from.

Every config field that changes a logit in PyTorch ends up here; an option that the graph cannot express is
refused by name. Biases are not here: they are read off the torch model's structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.families import HeadLayout, has_experts, heads_of
from rk_export.model.rotary import ALL_LAYERS

# Checked against PyTorch; the names are those of transformers' ACT2FN.
EXACT_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
OPT_NORM_EPSILON = 1e-5  # torch's LayerNorm default: OPT's config has no field for it
OPT_POSITION_OFFSET = 2  # rows before position 0 in OPT's table of positions


class NormNames(NamedTuple):
    """Names of a layer's norms by their place; None where the family has none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


PRE_NORM = NormNames("input_layernorm", None, "post_attention_layernorm", None)
POST_NORM = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
SANDWICH_NORM = NormNames(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer.

    Args:
        attention_scale: Factor on the dot products of queries and keys.
        window: Keys that a query sees, its own included; None = all before it.
        rotary: Name of the rotary table; None = no rotation.
        has_experts: Mixture of experts instead of one MLP.
    """

    attention_scale: float
    window: int | None
    rotary: str | None
    has_experts: bool


@dataclass(frozen=True)
class ExpertSpec:
    """Mixture of experts: count, how many a token uses, their width, and whether weights sum to 1."""

    count: int
    per_token: int
    intermediate_size: int
    normalized: bool


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder, biases and weights aside.

    Args:
        heads: Attention heads.
        layers: One entry a layer.
        vocab_size, hidden_size, intermediate_size: Widths; ``intermediate_size`` is that of a dense MLP.
        activation: Name of the MLP's activation.
        gated_mlp: ``down(act(gate(x)) * up(x))`` instead of ``down(act(up(x)))``.
        norm: ``rms`` or ``layer`` (mean removed, with bias).
        norm_names: Which norms a layer has.
        norm_epsilon: Added to the variance.
        query_key_norm: Norm of queries and keys: ``head`` by head, ``all`` heads together, or None.
        on_values: What is done to the values beside mixing them over tokens (a norm, a clip); empty for nothing.
        attention_softcap: ``cap * tanh(score / cap)``; 0 = none.
        learned_positions: Rows of a learned table of positions; 0 = none.
        embedding_scale: Factor on the token embedding.
        residual_scale: Factor on the outputs of attention and MLP.
        logit_scale: Factor on the logits.
        logit_softcap: ``cap * tanh(logit / cap)``; 0 = none.
        tied: The output projection is the token embedding.
        experts: Mixture of experts of the layers that have one.
    """

    heads: HeadLayout
    layers: tuple[LayerSpec, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    activation: str
    gated_mlp: bool
    norm: Literal["rms", "layer"]
    norm_names: NormNames
    norm_epsilon: float
    query_key_norm: Literal["head", "all"] | None
    on_values: str
    attention_softcap: float
    learned_positions: int
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    logit_softcap: float
    tied: bool
    experts: ExpertSpec | None


def decoder_spec(config: PretrainedConfig) -> DecoderSpec:
    """Read the spec of a decoder.

    Raises:
        UnsupportedModelError: The config turns on an option that the exported graph does not have.
    """
    family = config.model_type
    check_expressible(config)
    heads = heads_of(config)
    _check_heads(heads, is_rotated=not has_learned_positions(config))
    return DecoderSpec(
        heads=heads,
        layers=tuple(_layer_spec(config, index) for index in range(config.num_hidden_layers)),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=_intermediate_size(config),
        activation=activation_of(config),
        gated_mlp=family not in _LAYER_NORM,
        norm="layer" if family in _LAYER_NORM else "rms",
        norm_names=_NORM_NAMES.get(family, PRE_NORM),
        norm_epsilon=_norm_epsilon(config),
        query_key_norm=_query_key_norm(config),
        on_values=_ON_VALUES.get(family, ""),
        # Gemma 3's config has the field too, but its attention does not use it.
        attention_softcap=(config.attn_logit_softcapping or 0.0) if family == "gemma2" else 0.0,
        learned_positions=config.max_position_embeddings if has_learned_positions(config) else 0,
        embedding_scale=_embedding_scale(config),
        residual_scale=getattr(config, "residual_multiplier", 1.0),
        logit_scale=1.0 / getattr(config, "logits_scaling", 1.0),
        logit_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        tied=bool(config.tie_word_embeddings),
        experts=_expert_spec(config),
    )


def has_learned_positions(config: PretrainedConfig) -> bool:
    """Whether a decoder adds a learned table of positions, and rotates nothing."""
    return config.model_type in _LEARNED_POSITIONS


def check_expressible(config: PretrainedConfig) -> None:
    """Refuse options of a decoder or an encoder that the exported graph does not have.

    Raises:
        UnsupportedModelError: Names the option and the value that is supported.
    """
    for option, (supported, reason) in _REFUSED_UNLESS.get(config.model_type, {}).items():
        value = getattr(config, option, None)
        if (value or False) != supported:
            raise UnsupportedModelError(
                f"{option}={value!r}: {reason}",
                where="config.json",
                fix=f"use a model with {option}={supported!r}",
            )
    activation_of(config)


def activation_of(config: PretrainedConfig) -> str:
    """Return the name of the MLP's activation.

    Raises:
        UnsupportedModelError: The activation is not known to be exact in the exported graph.
    """
    fields = ("hidden_act", "hidden_activation", "activation_function")
    field = next(name for name in fields if getattr(config, name, None) is not None)
    activation = str(getattr(config, field))
    if activation not in EXACT_ACTIVATIONS:
        raise UnsupportedModelError(
            f"the activation {activation!r} is not supported",
            where=f"config.json: {field}",
            fix=f"use a model with one of {', '.join(EXACT_ACTIVATIONS)}",
        )
    return activation


def _check_heads(heads: HeadLayout, *, is_rotated: bool) -> None:
    """Refuse heads that GroupQueryAttention does not take; it says so when it runs."""
    multiple = 16 if is_rotated else 8
    if heads.heads % heads.kv_heads or heads.head_dim % multiple:
        raise UnsupportedModelError(
            f"{heads.heads} heads of width {heads.head_dim} on {heads.kv_heads} key/value heads: "
            f"GroupQueryAttention takes whole groups of heads and widths that are multiples of {multiple}",
            where="config.json: num_attention_heads, num_key_value_heads, head_dim",
        )


def _layer_spec(config: PretrainedConfig, index: int) -> LayerSpec:
    return LayerSpec(
        attention_scale=_attention_scale(config, index),
        window=_window(config, index),
        rotary=_rotary_name(config, index),
        has_experts=has_experts(config, index),
    )


def _attention_scale(config: PretrainedConfig, index: int) -> float:
    family = config.model_type
    if family in _GEMMA:
        return float(config.query_pre_attn_scalar**-0.5)
    if family == "granite":
        return float(config.attention_multiplier)
    head_dim = heads_of(config).head_dim
    if family == "gpt2":
        scale = head_dim**-0.5 if config.scale_attn_weights else 1.0
        return scale / (index + 1) if config.scale_attn_by_inverse_layer_idx else scale
    return float(head_dim**-0.5)


def _window(config: PretrainedConfig, index: int) -> int | None:
    if config.model_type in _UNIFORM_WINDOW:
        return _optional_int(config.sliding_window)
    if config.model_type in _WINDOW_BY_LAYER and config.layer_types[index] == "sliding_attention":
        return _optional_int(config.sliding_window)
    return None


def _optional_int(value: int | None) -> int | None:
    return None if value is None else int(value)


def _rotary_name(config: PretrainedConfig, index: int) -> str | None:
    if has_learned_positions(config):
        return None
    if config.model_type == "smollm3" and not config.no_rope_layers[index]:
        return None
    return ALL_LAYERS if "rope_type" in config.rope_parameters else str(config.layer_types[index])


def _query_key_norm(config: PretrainedConfig) -> Literal["head", "all"] | None:
    if config.model_type == "olmo2":
        return "all"
    return "head" if config.model_type in ("qwen3", "qwen3_moe", "gemma3_text") else None


def _embedding_scale(config: PretrainedConfig) -> float:
    if config.model_type in _GEMMA:
        return float(config.hidden_size**0.5)
    return float(getattr(config, "embedding_multiplier", 1.0))


def _intermediate_size(config: PretrainedConfig) -> int:
    if config.model_type == "opt":
        return int(config.ffn_dim)
    if config.model_type == "gpt2":
        return int(config.n_inner or 4 * config.hidden_size)
    return int(config.intermediate_size)


def _norm_epsilon(config: PretrainedConfig) -> float:
    if config.model_type == "opt":
        return OPT_NORM_EPSILON
    names = {"gpt2": "layer_norm_epsilon", "starcoder2": "norm_epsilon"}
    return float(getattr(config, names.get(config.model_type, "rms_norm_eps")))


def _expert_spec(config: PretrainedConfig) -> ExpertSpec | None:
    if config.model_type == "mixtral":
        return ExpertSpec(
            config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, normalized=True
        )
    if config.model_type == "qwen3_moe":
        return ExpertSpec(
            config.num_local_experts,
            config.num_experts_per_tok,
            config.moe_intermediate_size,
            normalized=bool(config.norm_topk_prob),
        )
    return None


_GEMMA = ("gemma2", "gemma3_text")
_NORM_NAMES = {"gemma2": SANDWICH_NORM, "gemma3_text": SANDWICH_NORM, "olmo2": POST_NORM}
# Of the supported families none does; the graph's attention has no place for it either.
_ON_VALUES: dict[str, str] = {}
_LAYER_NORM = ("gpt2", "opt", "starcoder2")
_LEARNED_POSITIONS = ("gpt2", "opt")
_UNIFORM_WINDOW = ("mistral", "mixtral", "phi3", "qwen3_moe", "starcoder2")
_WINDOW_BY_LAYER = ("gemma2", "gemma3_text", "qwen2", "qwen3", "smollm3")
_BIDIRECTIONAL = {"use_bidirectional_attention": (False, "the exported attention is causal")}
_REFUSED_UNLESS: dict[str, dict[str, tuple[bool, str]]] = {
    "gpt2": {"add_cross_attention": (False, "the exported decoder has no cross attention")},
    "opt": {
        "do_layer_norm_before": (True, "norms after the residual sum are not exported"),
        "_remove_final_layer_norm": (False, "a decoder without final norm is not exported"),
        "layer_norm_elementwise_affine": (True, "norms without weights are not exported"),
    },
    "gemma2": _BIDIRECTIONAL,
    "gemma3_text": _BIDIRECTIONAL,
    "bert": {
        "is_decoder": (False, "BERT is exported as an encoder"),
        "add_cross_attention": (False, "the exported encoder has no cross attention"),
    },
}

"""What a decoder computes: one frozen value that the graph is built from.

Every config field that changes a logit in PyTorch ends up here, or is refused by name; see `families`. Biases are not
here: they are read off the torch model's structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rk_export.model.architecture import HeadLayout


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


Mixer = Literal["attention", "short_conv"]


@dataclass(frozen=True)
class LayerSpec:
    """What differs from layer to layer.

    Args:
        attention_scale: Factor on the dot products of queries and keys.
        window: Keys that a query sees, its own included; None = all before it.
        rotary: Name of the rotary table; None = no rotation.
        has_experts: Mixture of experts instead of one MLP.
        mixer: What mixes tokens: attention, or a gated short convolution, which reads none of the first three.
    """

    attention_scale: float
    window: int | None
    rotary: str | None
    has_experts: bool
    mixer: Mixer = "attention"


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
        conv_taps: Tokens that a short convolution spans, its own included; 0 where no layer has one.
        conv_bias: Short convolutions and the projections around them have biases.
    """

    heads: HeadLayout
    layers: tuple[LayerSpec, ...]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    activation: str
    norm_epsilon: float
    tied: bool
    gated_mlp: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_names: NormNames = PRE_NORM
    query_key_norm: Literal["head", "all"] | None = None
    on_values: str = ""
    attention_softcap: float = 0.0
    learned_positions: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    experts: ExpertSpec | None = None
    conv_taps: int = 0
    conv_bias: bool = False

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with attention: those that have keys and values."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.mixer == "attention")

    @property
    def conv_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with a short convolution: those that carry a state."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.mixer == "short_conv")

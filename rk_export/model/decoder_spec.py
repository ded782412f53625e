"""What a decoder computes: one frozen value that the graph is built from.

Every config field that changes a logit in PyTorch ends up here, or is refused by name; see `families`. Biases are not
here: they are read off the torch model's structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from rk_export.model.architecture import HeadLayout
from rk_export.model.expert_spec import ExpertSpec

# ``rms``; or with the mean removed: ``layer`` with gain and shift, ``layer_no_bias`` with a gain, ``layer_plain``.
NormKind = Literal["rms", "layer", "layer_no_bias", "layer_plain"]


class NormNames(NamedTuple):
    """Names of a layer's norms by their place; None where the family has none."""

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


PRE_NORM = NormNames("input_layernorm", None, "post_attention_layernorm", None)
POST_NORM = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
# One norm in front of attention and MLP side by side, and one in front of each.
SHARED_NORM = NormNames("input_layernorm", None, "input_layernorm", None)
SANDWICH_NORM = NormNames(
    "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
)


Mixer = Literal["attention", "short_conv"]
_NORM_OF_ALL = "a norm over all of them"


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
class QueryGrowth:
    """Queries times ``1 + beta ln(1 + floor(position / original))``: long texts get sharper attention."""

    beta: float
    original: int


@dataclass(frozen=True)
class DecoderSpec:
    """A decoder, biases and weights aside.

    Args:
        heads: Attention heads.
        layers: One entry a layer.
        vocab_size, hidden_size, intermediate_size: Widths; ``intermediate_size`` is that of a dense MLP.
        activation: Name of the MLP's activation.
        gated_mlp: ``down(act(gate(x)) * up(x))`` instead of ``down(act(up(x)))``.
        parallel: Attention and MLP both read the input of the layer, and its output is the sum of all three.
        norm: Kind of all norms.
        norm_names: Which norms a layer has.
        norm_epsilon: Added to the variance.
        embedding_norm: A norm follows the embedding.
        sub_norms: A norm stands in front of the output projection of attention, and one in front of ``down``.
        query_key_norm: Norm of queries and keys: ``head`` by head with one gain, ``each head`` with gains of its own,
            ``all`` heads together, or None.
        norm_after_rotation: It follows the rotation.
        rotary_interleaved: Neighbours are rotated together, instead of coordinates half the rotated width apart.
        clip: Bound of queries, keys and values; 0 = none.
        query_growth: Factor on the queries by their position.
        alibi_slopes: Slope of each head: the score falls by it with each token of distance; empty = none.
        alibi_skips_holes: Distances count the tokens that the mask of a prompt shows, instead of its columns.
        attention_softcap: ``cap * tanh(score / cap)``; 0 = none.
        learned_positions: Rows of a learned table of positions; 0 = none.
        embedding_scale: Factor on the token embedding.
        residual_scale: Factor on the outputs of attention and MLP.
        logit_scale: Factor on the logits.
        logit_softcap: ``cap * tanh(logit / cap)``; 0 = none.
        tied: The output projection is the token embedding.
        experts: Mixture of experts of the layers that have one.
        conv_taps: Tokens that a short convolution spans, its own included; 0 where no layer has one.
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
    parallel: bool = False
    norm: NormKind = "rms"
    norm_names: NormNames = PRE_NORM
    embedding_norm: bool = False
    sub_norms: bool = False
    query_key_norm: Literal["head", "each head", "all"] | None = None
    norm_after_rotation: bool = False
    rotary_interleaved: bool = False
    clip: float = 0.0
    query_growth: QueryGrowth | None = None
    alibi_slopes: tuple[float, ...] = ()
    alibi_skips_holes: bool = False
    attention_softcap: float = 0.0
    learned_positions: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    experts: ExpertSpec | None = None
    conv_taps: int = 0

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with attention: those that have keys and values."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.mixer == "attention")

    @property
    def conv_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with a short convolution: those that carry a state."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.mixer == "short_conv")

    @property
    def is_rotated(self) -> bool:
        """Whether any layer rotates queries and keys."""
        return any(layer.rotary is not None for layer in self.layers)

    @property
    def shares_norm(self) -> bool:
        """Whether attention and MLP read the output of one norm."""
        return self.norm_names.before_attention == self.norm_names.before_mlp is not None

    @property
    def on_values(self) -> str:
        """What stands between the values and the output projection beside mixing over tokens; empty for nothing."""
        return _NORM_OF_ALL if self.sub_norms else "a clip" if self.clip else ""

    @property
    def on_neurons(self) -> str:
        """What stands between the activated neurons of the MLP and its down matrix; empty for nothing."""
        return _NORM_OF_ALL if self.sub_norms else ""

"""What an encoder computes, read from its Hugging Face config: one frozen value the graph is built from.

Every config field that changes an output in PyTorch ends up here; an option that the graph cannot express is refused
by name. Biases are not here: they are read off the torch model's structure.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rk_export.model.architecture import HeadLayout
from rk_export.model.decoder_spec import NormKind, NormNames

# A norm behind attention and one behind the MLP, on the residual sums.
ON_SUM = NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
Pooling = Literal["first", "mean", "mean of answers"]


@dataclass(frozen=True)
class EncoderLayerSpec:
    """What differs from layer to layer.

    Args:
        attention_scale: Factor on the dot products of queries and keys.
        reach: Positions between a query and the farthest key that it sees; None = it sees all.
        rotary: Name of the rotary table; None = no rotation.
        attention_norm: The norm in front of attention is there, where the family has one.
    """

    attention_scale: float
    reach: int | None = None
    rotary: str | None = None
    attention_norm: bool = True


@dataclass(frozen=True)
class LearnedPositions:
    """A learned table of positions, added to the token embedding.

    Args:
        rows: Of the table.
        padding: None: a token's position is the number of tokens before it that the mask marks. A token id: positions
            count the tokens that are not this one, from ``padding + 1`` on; this token has position ``padding``.
    """

    rows: int
    padding: int | None = None


@dataclass(frozen=True)
class ClassifierSpec:
    """A head that gives logits.

    Args:
        labels: How many.
        by_token: An answer for each token, (batch, length, labels); else one for the text, (batch, labels).
        pooling: What stands for the text: its first token; the mean over tokens; or the mean of the tokens' answers.
        activation: Of the dense layer in front of the classifier; empty where there is none.
        norm: There is a norm behind the activation.
    """

    labels: int
    by_token: bool
    pooling: Pooling = "first"
    activation: str = ""
    norm: bool = False


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder, biases and weights aside.

    Args:
        heads: Attention heads.
        layers: One entry a layer.
        vocab_size, embedding_size, hidden_size, intermediate_size: Widths; an embedding of another width than the
            hidden states is projected to theirs.
        activation: Name of the MLP's activation.
        gated_mlp: ``down(act(gate(x)) * up(x))`` instead of ``down(act(up(x)))``.
        norm: Kind of all norms.
        norm_names: Which norms a layer has.
        norm_on_sum: The norms behind attention and MLP normalize the residual sum, and not what is added to it.
        norm_epsilon: Added to the variance.
        query_key_norm: Norm of queries and keys, as in `DecoderSpec`.
        causal: A query sees the keys up to its own position only.
        positions: Learned positions; None = none.
        token_types: Rows of the table of token types; 0 = none.
        embedding_scale: Factor on the token embedding.
        embedding_norm: The sum of the embeddings is normalized.
        relative_buckets: Rows of the table of biases by relative position, shared by all layers; 0 = none.
        final_norm: The last hidden states are normalized.
        classifier: The head; None gives the last hidden states.
    """

    heads: HeadLayout
    layers: tuple[EncoderLayerSpec, ...]
    vocab_size: int
    embedding_size: int
    hidden_size: int
    intermediate_size: int
    activation: str
    gated_mlp: bool
    norm: NormKind
    norm_names: NormNames
    norm_on_sum: bool
    norm_epsilon: float
    query_key_norm: Literal["head", "each head", "all"] | None = None
    causal: bool = False
    positions: LearnedPositions | None = None
    token_types: int = 0
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    relative_buckets: int = 0
    final_norm: bool = False
    classifier: ClassifierSpec | None = None

    @property
    def is_rotated(self) -> bool:
        """Whether any layer rotates queries and keys."""
        return any(layer.rotary is not None for layer in self.layers)

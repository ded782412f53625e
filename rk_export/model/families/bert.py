"""BERT and its kin: learned positions, norms behind the residual sums, a plain MLP."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import POSITIONS, Architecture
from rk_export.model.config_fields import activation_of, number, plain_heads
from rk_export.model.encoder_names import EMBEDDING_NORM, PROJECTION, RELATIVE, TYPES, ClassifierNames
from rk_export.model.encoder_spec import ON_SUM, EncoderLayerSpec, EncoderSpec, LearnedPositions
from rk_export.model.families.base import Family, Refused
from rk_export.model.relative_positions import BUCKETS

_EMBEDDINGS = {
    "embeddings.position_embeddings": POSITIONS,
    "embeddings.token_type_embeddings": TYPES,
    "embeddings.LayerNorm": EMBEDDING_NORM,
}
_LLAMA_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_FEED_FORWARD = {
    "intermediate.dense": "mlp.up_proj",
    "output.dense": "mlp.down_proj",
    "output.LayerNorm": "post_feedforward_layernorm",
}


def _names(model_type: str, *, unused: tuple[str, ...] = ("pooler",)) -> Architecture:
    paths = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    q, k, v, o = paths
    return Architecture(
        model_type,
        layers="encoder.layer",
        embedding="embeddings.word_embeddings",
        lm_head=None,
        onnx_lm_head=None,
        attention=(("q", q), ("k", k), ("v", v), ("o", o)),
        mlp=(("up", "intermediate.dense"), ("down", "output.dense")),
        renamed={
            **dict(zip(paths, _LLAMA_ATTENTION, strict=True)),
            "attention.output.LayerNorm": "post_attention_layernorm",
            **_FEED_FORWARD,
        },
        outer=_EMBEDDINGS,
        unused=unused,
    )


_ELECTRA = replace(
    _names("electra", unused=()),
    pretraining=("generator_predictions.", "generator_lm_head.", "discriminator_predictions."),
)
_DISTILBERT = Architecture(
    "distilbert",
    layers="transformer.layer",
    embedding="embeddings.word_embeddings",
    lm_head=None,
    onnx_lm_head=None,
    attention=(
        ("q", "attention.q_lin"),
        ("k", "attention.k_lin"),
        ("v", "attention.v_lin"),
        ("o", "attention.out_lin"),
    ),
    mlp=(("up", "ffn.lin1"), ("down", "ffn.lin2")),
    renamed={
        "attention.q_lin": "self_attn.q_proj",
        "attention.k_lin": "self_attn.k_proj",
        "attention.v_lin": "self_attn.v_proj",
        "attention.out_lin": "self_attn.o_proj",
        "sa_layer_norm": "post_attention_layernorm",
        "ffn.lin1": "mlp.up_proj",
        "ffn.lin2": "mlp.down_proj",
        "output_layer_norm": "post_feedforward_layernorm",
    },
    outer={"embeddings.position_embeddings": POSITIONS, "embeddings.LayerNorm": EMBEDDING_NORM},
    pretraining=("vocab_transform.", "vocab_layer_norm.", "vocab_projector."),
    width_field="hidden_dim",
)
_MPNET = Architecture(
    "mpnet",
    layers="encoder.layer",
    embedding="embeddings.word_embeddings",
    lm_head=None,
    onnx_lm_head=None,
    attention=(
        ("q", "attention.attn.q"),
        ("k", "attention.attn.k"),
        ("v", "attention.attn.v"),
        ("o", "attention.attn.o"),
    ),
    mlp=(("up", "intermediate.dense"), ("down", "output.dense")),
    renamed={
        "attention.attn.q": "self_attn.q_proj",
        "attention.attn.k": "self_attn.k_proj",
        "attention.attn.v": "self_attn.v_proj",
        "attention.attn.o": "self_attn.o_proj",
        "attention.LayerNorm": "post_attention_layernorm",
        **_FEED_FORWARD,
    },
    outer={
        "embeddings.position_embeddings": POSITIONS,
        "embeddings.LayerNorm": EMBEDDING_NORM,
        "encoder.relative_attention_bias": RELATIVE,
    },
    unused=("pooler",),
    tuple_layers=True,
)
# Neither class reads its config for them.
_DISTILBERT_EPSILON, _MPNET_PADDING = 1e-12, 1


def bert_spec(config: PretrainedConfig, **changes: Any) -> EncoderSpec:
    """Return the spec of an encoder that is a BERT but for some changes.

    Args:
        config: Of the model.
        **changes: Fields of `EncoderSpec`.

    Raises:
        UnsupportedModelError: The config asks for what the graph does not have.
    """
    _check_positions(config)
    heads = plain_heads(config)
    read: dict[str, Any] = {
        "heads": heads,
        "layers": (EncoderLayerSpec(heads.head_dim**-0.5),) * int(config.num_hidden_layers),
        "vocab_size": int(config.vocab_size),
        "embedding_size": int(config.hidden_size),
        "hidden_size": int(config.hidden_size),
        "gated_mlp": False,
        "norm": "layer",
        "norm_names": ON_SUM,
        "norm_on_sum": True,
        "embedding_norm": True,
    }
    if "positions" not in changes:
        read["positions"] = LearnedPositions(int(config.max_position_embeddings))
    if "activation" not in changes:
        read["activation"] = activation_of(config)
    if "norm_epsilon" not in changes:
        read["norm_epsilon"] = number(config, "layer_norm_eps")
    if "intermediate_size" not in changes:
        read["intermediate_size"] = int(config.intermediate_size)
    if "token_types" not in changes:
        read["token_types"] = _token_types(config)
    return EncoderSpec(**{**read, **changes})


def _roberta(config: PretrainedConfig) -> EncoderSpec:
    if config.pad_token_id is None:
        raise UnsupportedModelError(
            "pad_token_id=None: positions are counted from it", where="config.json", fix="name the token"
        )
    return bert_spec(
        config, positions=LearnedPositions(int(config.max_position_embeddings), int(config.pad_token_id))
    )


def _padding_rows(config: PretrainedConfig) -> int:
    """Positions begin behind the padding token's."""
    return int(config.pad_token_id or 0) + 1


def _electra_names(config: PretrainedConfig) -> Architecture:
    if config.embedding_size == config.hidden_size:
        return _ELECTRA
    return replace(_ELECTRA, outer={**_ELECTRA.outer, "embeddings_project": PROJECTION})


def _electra(config: PretrainedConfig) -> EncoderSpec:
    return bert_spec(config, embedding_size=int(config.embedding_size))


def _distilbert(config: PretrainedConfig) -> EncoderSpec:
    return bert_spec(
        config,
        intermediate_size=int(config.hidden_dim),
        activation=activation_of(config, ("activation",)),
        norm_epsilon=_DISTILBERT_EPSILON,
        token_types=0,
    )


def _mpnet(config: PretrainedConfig) -> EncoderSpec:
    rows = int(config.relative_attention_num_buckets)
    if rows < BUCKETS:
        raise UnsupportedModelError(
            f"relative_attention_num_buckets={rows}: MPNet computes with {BUCKETS} buckets, whatever it says",
            where="config.json",
            fix=f"use a model with relative_attention_num_buckets={BUCKETS}",
        )
    return bert_spec(
        config,
        positions=LearnedPositions(int(config.max_position_embeddings), _MPNET_PADDING),
        token_types=0,
        relative_buckets=rows,
    )


def _token_types(config: PretrainedConfig) -> int:
    types = int(config.type_vocab_size)
    if types < 1:
        raise UnsupportedModelError(
            f"type_vocab_size={types}: every token has a type",
            where="config.json",
            fix="use a model with a type of tokens",
        )
    return types


def _check_positions(config: PretrainedConfig) -> None:
    kind = getattr(config, "position_embedding_type", None)
    if kind not in (None, "absolute", "rope"):
        raise UnsupportedModelError(
            f"position_embedding_type={kind!r}: only absolute positions are exported",
            where="config.json",
            fix="use a model with position_embedding_type='absolute'",
        )


def plain_classifier(config: PretrainedConfig) -> ClassifierNames:
    """Return the classifier that is one linear."""
    return ClassifierNames()


def dense_classifier(activation: str) -> Any:
    """Return what reads the classifier of two linears."""
    names = ClassifierNames("classifier.out_proj", "classifier.dense", activation)
    return lambda config: names


def pooler_classifier(base: str) -> Any:
    """Return what reads the classifier on the encoder's own pooler."""
    names = ClassifierNames(dense=f"{base}.pooler.dense", activation="tanh")
    return lambda config: names


def _distilbert_classifier(config: PretrainedConfig) -> ClassifierNames:
    return ClassifierNames(dense="pre_classifier", activation="relu")


_NOT_A_DECODER = (
    Refused("is_decoder", False, "it is exported as an encoder"),
    Refused("add_cross_attention", False, "the exported encoder has no cross attention"),
)


def _bert_like(names: Architecture, **more: Any) -> Family:
    return Family(names, refused=_NOT_A_DECODER, tokens=plain_classifier, **more)


FAMILIES = (
    _bert_like(_names("bert"), encoder=bert_spec, base="bert", sequence=pooler_classifier("bert")),
    *(
        _bert_like(
            _names(name),
            encoder=_roberta,
            skipped_rows=_padding_rows,
            base="roberta",
            sequence=dense_classifier("tanh"),
        )
        for name in ("roberta", "xlm-roberta", "camembert")
    ),
    _bert_like(
        _ELECTRA,
        encoder=_electra,
        variant=_electra_names,
        base="electra",
        sequence=dense_classifier("gelu"),
    ),
    Family(
        _DISTILBERT,
        encoder=_distilbert,
        base="distilbert",
        sequence=_distilbert_classifier,
        tokens=plain_classifier,
    ),
    Family(
        _MPNET,
        encoder=_mpnet,
        skipped_rows=lambda config: _MPNET_PADDING + 1,
        base="mpnet",
        sequence=dense_classifier("tanh"),
        tokens=plain_classifier,
    ),
)

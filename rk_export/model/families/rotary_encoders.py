"""Encoders that rotate queries and keys: Nomic-BERT, GTE, Jina's third, EuroBERT."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import GATED_MLP, Architecture, RolePaths
from rk_export.model.config_fields import activation_of, number, plain_heads, rotary_table
from rk_export.model.decoder_spec import PRE_NORM
from rk_export.model.encoder_names import EMBEDDING_NORM, TYPES, ClassifierNames
from rk_export.model.encoder_spec import EncoderLayerSpec, EncoderSpec, Pooling
from rk_export.model.families.base import Family
from rk_export.model.families.bert import (
    bert_spec,
    dense_classifier,
    plain_classifier,
    pooler_classifier,
)


def _names(model_type: str, mlp: RolePaths = GATED_MLP, **renamed: str) -> Architecture:
    return Architecture(
        model_type,
        layers="layers",
        embedding="embeddings.word_embeddings",
        lm_head=None,
        onnx_lm_head=None,
        mlp=mlp,
        renamed={
            "post_mlp_layernorm": "post_feedforward_layernorm",
            **{f"mlp.{own}": f"mlp.{usual}" for own, usual in renamed.items()},
        },
        outer={"embeddings.token_type_embeddings": TYPES, "embeddings.LayerNorm": EMBEDDING_NORM},
        unused=("pooler",),
        rotary="rotary_emb",
    )


_EUROBERT = Architecture(
    "eurobert",
    layers="layers",
    embedding="embed_tokens",
    lm_head=None,
    onnx_lm_head=None,
    outer={"norm": "model.norm"},
    rotary="rotary_emb",
)


def _rotated(config: PretrainedConfig) -> tuple[EncoderLayerSpec, ...]:
    scale = plain_heads(config).head_dim ** -0.5
    return tuple(
        EncoderLayerSpec(scale, rotary=rotary_table(config, index))
        for index in range(config.num_hidden_layers)
    )


def _gated(config: PretrainedConfig) -> EncoderSpec:
    return bert_spec(config, layers=_rotated(config), positions=None, gated_mlp=True)


def _jina(config: PretrainedConfig) -> EncoderSpec:
    return bert_spec(config, layers=_rotated(config), positions=None)


def _eurobert(config: PretrainedConfig) -> EncoderSpec:
    return EncoderSpec(
        heads=plain_heads(config),
        layers=_rotated(config),
        vocab_size=int(config.vocab_size),
        embedding_size=int(config.hidden_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        activation=activation_of(config),
        gated_mlp=True,
        norm="rms",
        norm_names=PRE_NORM,
        norm_on_sum=False,
        norm_epsilon=number(config, "rms_norm_eps"),
        final_norm=True,
    )


def _eurobert_classifier(config: PretrainedConfig) -> ClassifierNames:
    known: dict[str, Pooling] = {"bos": "first", "mean": "mean", "late": "mean of answers"}
    pooling = known.get(config.classifier_pooling)
    if pooling is None:
        raise UnsupportedModelError(
            f"classifier_pooling={config.classifier_pooling!r}: EuroBERT knows {', '.join(known)}",
            where="config.json",
        )
    return ClassifierNames(dense="dense", activation="gelu", pooling=pooling)


FAMILIES = (
    Family(
        _names("nomic_bert"),
        encoder=_gated,
        base="nomic_bert",
        sequence=pooler_classifier("nomic_bert"),
        tokens=plain_classifier,
    ),
    Family(
        _names("gte"),
        encoder=_gated,
        base="gte",
        sequence=pooler_classifier("gte"),
        tokens=plain_classifier,
    ),
    Family(
        _names(
            "jina_embeddings_v3", (("up", "mlp.fc1"), ("down", "mlp.fc2")), fc1="up_proj", fc2="down_proj"
        ),
        encoder=_jina,
        base="roberta",
        sequence=dense_classifier("tanh"),
        tokens=plain_classifier,
    ),
    Family(
        _EUROBERT,
        encoder=_eurobert,
        base="model",
        sequence=_eurobert_classifier,
        tokens=plain_classifier,
    ),
)

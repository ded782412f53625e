"""ModernBERT: norms in front of the blocks, rotation with two bases, windows, joined matrices."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.canonical import split_linear
from rk_export.model.config_fields import activation_of, number, plain_heads, rotary_table
from rk_export.model.decoder_spec import PRE_NORM
from rk_export.model.encoder_names import EMBEDDING_NORM, ClassifierNames
from rk_export.model.encoder_spec import EncoderLayerSpec, EncoderSpec
from rk_export.model.families.base import Family


def _split(layer: nn.Module) -> None:
    attention, mlp = layer.get_submodule("attn"), layer.get_submodule("mlp")
    if isinstance(attention.Wqkv, nn.Linear):
        third = attention.Wqkv.out_features // 3
        attention.Wqkv = split_linear(attention.Wqkv, {"q_proj": third, "k_proj": third, "v_proj": third})
    if isinstance(mlp.Wi, nn.Linear):
        half = mlp.Wi.out_features // 2
        # The activation acts on the first half, which it calls the input.
        mlp.Wi = split_linear(mlp.Wi, {"gate_proj": half, "up_proj": half})


_NAMES = Architecture(
    "modernbert",
    layers="layers",
    embedding="embeddings.tok_embeddings",
    lm_head=None,
    onnx_lm_head=None,
    attention=(
        ("q", "attn.Wqkv.q_proj"),
        ("k", "attn.Wqkv.k_proj"),
        ("v", "attn.Wqkv.v_proj"),
        ("o", "attn.Wo"),
    ),
    mlp=(("gate", "mlp.Wi.gate_proj"), ("up", "mlp.Wi.up_proj"), ("down", "mlp.Wo")),
    renamed={
        "attn.Wqkv": "self_attn",
        "attn.Wo": "self_attn.o_proj",
        "attn_norm": "input_layernorm",
        "mlp.Wi": "mlp",
        "mlp.Wo": "mlp.down_proj",
        "mlp_norm": "post_attention_layernorm",
    },
    outer={"embeddings.norm": EMBEDDING_NORM, "final_norm": "model.norm"},
    pretraining=("head.", "decoder."),
    rotary="rotary_emb",
    rewrite=_split,
)


def _layer(config: PretrainedConfig, index: int) -> EncoderLayerSpec:
    is_local = config.layer_types[index] == "sliding_attention"
    return EncoderLayerSpec(
        plain_heads(config).head_dim ** -0.5,
        reach=int(config.sliding_window) if is_local else None,
        rotary=rotary_table(config, index),
        attention_norm=index > 0,
    )


def _modernbert(config: PretrainedConfig) -> EncoderSpec:
    return EncoderSpec(
        heads=plain_heads(config),
        layers=tuple(_layer(config, index) for index in range(config.num_hidden_layers)),
        vocab_size=int(config.vocab_size),
        embedding_size=int(config.hidden_size),
        hidden_size=int(config.hidden_size),
        intermediate_size=int(config.intermediate_size),
        activation=activation_of(config),
        gated_mlp=True,
        norm="layer" if config.norm_bias else "layer_no_bias",
        norm_names=PRE_NORM,
        norm_on_sum=False,
        norm_epsilon=number(config, "norm_eps"),
        embedding_norm=True,
        final_norm=True,
    )


def _classifier(config: PretrainedConfig) -> ClassifierNames:
    return ClassifierNames(
        dense="head.dense",
        norm="head.norm",
        activation=activation_of(config, ("classifier_activation",)),
        pooling="mean" if config.classifier_pooling == "mean" else "first",
    )


FAMILIES = (Family(_NAMES, encoder=_modernbert, base="model", sequence=_classifier, tokens=_classifier),)

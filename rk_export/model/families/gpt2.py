"""GPT-2: learned positions, joined and transposed matrices, attention that may be scaled by the layer's number."""

from __future__ import annotations

from dataclasses import replace

from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from rk_export.model.architecture import Architecture
from rk_export.model.canonical import linear_from_conv1d, split_linear
from rk_export.model.config_fields import layer_specs, llama_spec, number, plain_heads
from rk_export.model.decoder_spec import DecoderSpec, LayerSpec
from rk_export.model.families.base import Family, Refused


def _gpt2(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=_layers(config),
        intermediate_size=int(config.n_inner or 4 * config.hidden_size),
        gated_mlp=False,
        norm="layer",
        norm_epsilon=number(config, "layer_norm_epsilon"),
        learned_positions=int(config.max_position_embeddings),
    )


def _layers(config: PretrainedConfig) -> tuple[LayerSpec, ...]:
    scale = plain_heads(config).head_dim ** -0.5 if config.scale_attn_weights else 1.0
    layers = layer_specs(config, scale=scale, rotary=lambda config, index: None)
    if not config.scale_attn_by_inverse_layer_idx:
        return layers
    return tuple(
        replace(layer, attention_scale=layer.attention_scale / number)
        for number, layer in enumerate(layers, 1)
    )


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


GPT2_NAMES = Architecture(
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
    width_field="n_inner",
    rewrite=_split_gpt2,
)
_REFUSED = (Refused("add_cross_attention", False, "the exported decoder has no cross attention"),)
FAMILIES = (Family(GPT2_NAMES, _gpt2, _REFUSED),)

"""GPT-Neo: GPT-2 without joined matrices, with windows in some layers and scores that are not scaled."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture
from rk_export.model.config_fields import layer_specs, llama_spec, number
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family


def _gpt_neo(config: PretrainedConfig) -> DecoderSpec:
    width = config.intermediate_size
    return llama_spec(
        config,
        layers=layer_specs(config, scale=1.0, window=_window, rotary=lambda config, index: None),
        intermediate_size=int(4 * config.hidden_size if width is None else width),
        gated_mlp=False,
        norm="layer",
        norm_epsilon=number(config, "layer_norm_epsilon"),
        learned_positions=int(config.max_position_embeddings),
    )


def _window(config: PretrainedConfig, index: int) -> int | None:
    if config.attention_layers[index] != "local":
        return None
    if config.window_size < 1:
        raise UnsupportedModelError(
            f"window_size={config.window_size}: a token must see itself", where="config.json: window_size"
        )
    return int(config.window_size)


_NAMES = Architecture(
    "gpt_neo",
    layers="transformer.h",
    embedding="transformer.wte",
    attention=(
        ("q", "attn.attention.q_proj"),
        ("k", "attn.attention.k_proj"),
        ("v", "attn.attention.v_proj"),
        ("o", "attn.attention.out_proj"),
    ),
    mlp=(("up", "mlp.c_fc"), ("down", "mlp.c_proj")),
    renamed={
        "attn.attention.out_proj": "self_attn.o_proj",
        "attn.attention": "self_attn",
        "mlp.c_fc": "mlp.up_proj",
        "mlp.c_proj": "mlp.down_proj",
        "ln_1": "input_layernorm",
        "ln_2": "post_attention_layernorm",
    },
    outer={"transformer.wpe": "model.embed_positions", "transformer.ln_f": "model.norm"},
    tuple_layers=True,
)
FAMILIES = (Family(_NAMES, _gpt_neo),)

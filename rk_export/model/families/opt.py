"""OPT: learned positions behind two unused rows, LayerNorm, an MLP without a gate."""

from __future__ import annotations

from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import ATTENTION, Architecture
from rk_export.model.config_fields import layer_specs, llama_spec
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.base import Family, Refused

NORM_EPSILON = 1e-5  # torch's LayerNorm default: the config has no field for it


def _opt(config: PretrainedConfig) -> DecoderSpec:
    if config.word_embed_proj_dim != config.hidden_size:
        raise UnsupportedModelError(
            f"word_embed_proj_dim={config.word_embed_proj_dim}, hidden_size={config.hidden_size}: "
            "a projection between the embedding and the layers is not exported",
            where="config.json: word_embed_proj_dim",
            fix="use a model where both are the same; of OPT's only the one with 350M parameters differs",
        )
    return llama_spec(
        config,
        layers=layer_specs(config, rotary=lambda config, index: None),
        intermediate_size=int(config.ffn_dim),
        gated_mlp=False,
        norm="layer",
        norm_epsilon=NORM_EPSILON,
        learned_positions=int(config.max_position_embeddings),
    )


_NAMES = Architecture(
    "opt",
    layers="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    attention=(*ATTENTION[:3], ("o", "self_attn.out_proj")),
    mlp=(("up", "fc1"), ("down", "fc2")),
    renamed={
        "self_attn.out_proj": "self_attn.o_proj",
        "fc1": "mlp.up_proj",
        "fc2": "mlp.down_proj",
        "self_attn_layer_norm": "input_layernorm",
        "final_layer_norm": "post_attention_layernorm",
    },
    outer={
        "model.decoder.embed_positions": "model.embed_positions",
        "model.decoder.final_layer_norm": "model.norm",
    },
    skipped_positions=2,
    width_field="ffn_dim",
)
_REFUSED = (
    Refused("do_layer_norm_before", True, "norms after the residual sum are not exported"),
    Refused("_remove_final_layer_norm", False, "a decoder without final norm is not exported"),
    Refused("layer_norm_elementwise_affine", True, "norms without weights are not exported"),
)
FAMILIES = (Family(_NAMES, _opt, _REFUSED),)

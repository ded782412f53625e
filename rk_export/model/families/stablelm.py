"""StableLM: LayerNorm around a Llama, and options for parallel blocks and a norm for each head."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig
from transformers.models.stablelm.modeling_stablelm import StableLmLayerNormPerHead

from rk_export.model.architecture import Architecture
from rk_export.model.canonical import EachHeadNorm
from rk_export.model.config_fields import llama_spec, number
from rk_export.model.decoder_spec import PRE_NORM, SHARED_NORM, DecoderSpec
from rk_export.model.families.base import Family


def _stablelm(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        parallel=bool(config.use_parallel_residual),
        norm="layer",
        norm_names=SHARED_NORM if config.use_parallel_residual else PRE_NORM,
        norm_epsilon=number(config, "layer_norm_eps"),
        query_key_norm="each head" if config.qk_layernorm else None,
    )


def _join_norms(layer: nn.Module) -> None:
    attention = layer.get_submodule("self_attn")
    for name in ("q_layernorm", "k_layernorm"):
        norms = getattr(attention, name, None)
        if isinstance(norms, StableLmLayerNormPerHead):
            setattr(attention, name, EachHeadNorm(norms.norms))


_NAMES = Architecture(
    "stablelm",
    renamed={"self_attn.q_layernorm": "self_attn.q_norm", "self_attn.k_layernorm": "self_attn.k_norm"},
    rewrite=_join_norms,
)
FAMILIES = (Family(_NAMES, _stablelm),)

"""Mixtures of experts: the MLP of some layers is a choice among many."""

from __future__ import annotations

from torch import nn
from transformers import PretrainedConfig

from rk_export.model.architecture import Architecture
from rk_export.model.canonical import Experts, split_experts
from rk_export.model.config_fields import every_window, layer_specs, llama_spec
from rk_export.model.decoder_spec import DecoderSpec, ExpertSpec
from rk_export.model.families.base import Family


def _in_every_layer(config: PretrainedConfig, index: int) -> bool:
    return True


def _in_sparse_layers(config: PretrainedConfig, index: int) -> bool:
    return (index + 1) % config.decoder_sparse_step == 0 and index not in config.mlp_only_layers


def _mixtral(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, window=every_window, has_experts=_in_every_layer),
        experts=ExpertSpec(
            config.num_local_experts, config.num_experts_per_tok, config.intermediate_size, normalized=True
        ),
    )


def _qwen3_moe(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, window=every_window, has_experts=_in_sparse_layers),
        query_key_norm="head",
        experts=ExpertSpec(
            config.num_local_experts,
            config.num_experts_per_tok,
            config.moe_intermediate_size,
            normalized=bool(config.norm_topk_prob),
        ),
    )


def _split_moe(layer: nn.Module) -> None:
    mlp = layer.get_submodule("mlp")
    experts = getattr(mlp, "experts", None)
    if isinstance(experts, nn.Module) and not isinstance(experts, Experts):
        mlp.experts = split_experts(experts)


FAMILIES = (
    Family(Architecture("mixtral", experts_in=_in_every_layer, rewrite=_split_moe), _mixtral),
    Family(Architecture("qwen3_moe", experts_in=_in_sparse_layers, rewrite=_split_moe), _qwen3_moe),
)

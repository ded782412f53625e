"""Mixtures of experts: the MLP of some layers is a choice among many."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.architecture import Architecture, MixtureNames, RolePaths, nothing_shared
from rk_export.model.canonical import Experts, split_experts, split_gate_up
from rk_export.model.config_fields import (
    every_window,
    layer_specs,
    llama_spec,
    number,
    window_by_type,
)
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.expert_spec import (
    SPARSE_MIXER_EXPERTS,
    CorrectedRouting,
    ExpertSpec,
    Routing,
    SharedExpert,
    SoftmaxRouting,
    SparseMixerRouting,
)
from rk_export.model.families.base import Family
from rk_export.model.families.granite import attention_scale, divided_logits, scaled_spec
from rk_export.model.families.olmo import clip_of

_SHARED_EXPERT = "mlp.shared_expert"
_PER_TOKEN = "num_experts_per_tok"


def _in_every_layer(config: PretrainedConfig, index: int) -> bool:
    return True


def _in_sparse_layers(config: PretrainedConfig, index: int) -> bool:
    return (index + 1) % config.decoder_sparse_step == 0 and index not in config.mlp_only_layers


def _in_sparse_layers_with_experts(config: PretrainedConfig, index: int) -> bool:
    return bool(config.num_experts > 0) and _in_sparse_layers(config, index)


def _in_ernie_layers(config: PretrainedConfig, index: int) -> bool:
    within = config.moe_layer_start_index <= index <= config.moe_layer_end_index
    return bool(within and (index + 1) % config.moe_layer_interval == 0)


def experts_of(
    config: PretrainedConfig,
    count: int,
    per_token: int | None,
    width: int,
    routing: Routing,
    shared: SharedExpert | None = None,
) -> ExpertSpec:
    """Return the spec of a mixture.

    Raises:
        UnsupportedModelError: A token cannot choose as many experts as it should.
    """
    if per_token is None or not 1 <= per_token <= count:
        raise UnsupportedModelError(
            f"a token cannot run through {per_token} of {count} experts",
            where=f"config.json: {config.attribute_map.get(_PER_TOKEN, _PER_TOKEN)}",
            fix="give the numbers that the weights were made with",
        )
    return ExpertSpec(count, per_token, width, routing, shared)


def _mixtral(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, window=every_window, has_experts=_in_every_layer),
        experts=experts_of(
            config,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.intermediate_size,
            SoftmaxRouting(normalized=True),
        ),
    )


def _qwen3_moe(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, window=every_window, has_experts=_in_sparse_layers),
        query_key_norm="head",
        experts=experts_of(
            config,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.moe_intermediate_size,
            SoftmaxRouting(normalized=bool(config.norm_topk_prob)),
        ),
    )


def _qwen2_moe(config: PretrainedConfig) -> DecoderSpec:
    layers = layer_specs(config, window=window_by_type, has_experts=_in_sparse_layers_with_experts)
    if not any(layer.has_experts for layer in layers):
        return llama_spec(config, layers=layers)
    experts = experts_of(
        config,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        SoftmaxRouting(normalized=bool(config.norm_topk_prob)),
        SharedExpert(config.shared_expert_intermediate_size, has_gate=True),
    )
    return llama_spec(config, layers=layers, experts=experts)


def _olmoe(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, has_experts=_in_every_layer),
        query_key_norm="all",
        clip=clip_of(config),
        experts=experts_of(
            config,
            config.num_experts,
            config.num_experts_per_tok,
            config.intermediate_size,
            SoftmaxRouting(normalized=bool(config.norm_topk_prob)),
        ),
    )


def _granitemoe(config: PretrainedConfig) -> DecoderSpec:
    shared = getattr(config, "shared_intermediate_size", 0)
    return scaled_spec(
        config,
        layers=layer_specs(config, scale=attention_scale(config), has_experts=_in_every_layer),
        logit_scale=divided_logits(config),
        experts=experts_of(
            config,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.intermediate_size,
            SoftmaxRouting(normalized=True),
            SharedExpert(shared) if shared else None,
        ),
    )


def _phimoe(config: PretrainedConfig) -> DecoderSpec:
    return llama_spec(
        config,
        layers=layer_specs(config, window=every_window, has_experts=_in_every_layer),
        norm="layer",
        experts=experts_of(
            config,
            config.num_local_experts,
            SPARSE_MIXER_EXPERTS,
            config.intermediate_size,
            SparseMixerRouting(2.0 * config.router_jitter_noise),
        ),
    )


def _ernie4_5_moe(config: PretrainedConfig) -> DecoderSpec:
    layers = layer_specs(config, has_experts=_in_ernie_layers)
    shared = config.moe_num_shared_experts * config.moe_intermediate_size
    experts = experts_of(
        config,
        config.num_experts,
        config.num_experts_per_tok,
        config.moe_intermediate_size,
        CorrectedRouting(number(config, "moe_norm_min")),
        SharedExpert(shared, has_bias=bool(config.use_bias)) if shared else None,
    )
    return llama_spec(config, layers=layers, rotary_interleaved=True, experts=experts)


def shared_matrices(path: str) -> RolePaths:
    """Return the matrices of an MLP at a path that every token runs through."""
    return ("gate", f"{path}.gate_proj"), ("up", f"{path}.up_proj"), ("down", f"{path}.down_proj")


def _qwen2_shared(config: PretrainedConfig) -> RolePaths:
    return shared_matrices(_SHARED_EXPERT)


def _ernie_shared(config: PretrainedConfig) -> RolePaths:
    return shared_matrices("mlp.shared_experts") if config.moe_num_shared_experts else ()


def _granite_shared(config: PretrainedConfig) -> RolePaths:
    if not config.shared_intermediate_size:
        return ()
    joined = "shared_mlp.input_linear"
    return ("gate", f"{joined}.gate_proj"), ("up", f"{joined}.up_proj"), ("down", "shared_mlp.output_linear")


def splitting(path: str) -> Callable[[nn.Module], None]:
    """Return what cuts the stack of experts at a path of a layer into one module each, where there is a stack."""

    def split(layer: nn.Module) -> None:
        parent, _, name = path.rpartition(".")
        holder = layer.get_submodule(parent)
        experts = getattr(holder, name, None)
        if isinstance(experts, nn.Module) and not isinstance(experts, Experts):
            setattr(holder, name, split_experts(experts))

    return split


def _split_granite(layer: nn.Module) -> None:
    splitting("block_sparse_moe.experts")(layer)
    shared = getattr(layer, "shared_mlp", None)
    if isinstance(shared, nn.Module) and isinstance(shared.input_linear, nn.Linear):
        shared.input_linear = split_gate_up(shared.input_linear)


_IN_MLP = splitting("mlp.experts")
_GRANITE_RENAMED = {
    "block_sparse_moe.router": "mlp.gate",
    "block_sparse_moe.experts": "mlp.experts",
    "shared_mlp.input_linear": _SHARED_EXPERT,
    "shared_mlp.output_linear": f"{_SHARED_EXPERT}.down_proj",
}


def _granite_names(model_type: str, shared: Callable[[PretrainedConfig], RolePaths]) -> Architecture:
    mixture = MixtureNames(
        _in_every_layer, "block_sparse_moe.experts", readers=("block_sparse_moe.router",), shared=shared
    )
    return Architecture(model_type, mixture=mixture, renamed=_GRANITE_RENAMED, rewrite=_split_granite)


FAMILIES = (
    Family(Architecture("mixtral", mixture=MixtureNames(_in_every_layer), rewrite=_IN_MLP), _mixtral),
    Family(Architecture("qwen3_moe", mixture=MixtureNames(_in_sparse_layers), rewrite=_IN_MLP), _qwen3_moe),
    Family(
        Architecture(
            "qwen2_moe",
            mixture=MixtureNames(
                _in_sparse_layers_with_experts,
                count_field="num_experts",
                readers=("mlp.gate", "mlp.shared_expert_gate"),
                shared=_qwen2_shared,
            ),
            rewrite=_IN_MLP,
        ),
        _qwen2_moe,
    ),
    Family(
        Architecture(
            "olmoe", mixture=MixtureNames(_in_every_layer, count_field="num_experts"), rewrite=_IN_MLP
        ),
        _olmoe,
    ),
    Family(_granite_names("granitemoe", nothing_shared), _granitemoe),
    Family(_granite_names("granitemoeshared", _granite_shared), _granitemoe),
    Family(
        Architecture(
            "phimoe",
            mixture=MixtureNames(_in_every_layer, readers=("mlp.router",)),
            renamed={"mlp.router": "mlp.gate"},
            rewrite=_IN_MLP,
        ),
        _phimoe,
    ),
    Family(
        Architecture(
            "ernie4_5_moe",
            mixture=MixtureNames(_in_ernie_layers, count_field="num_experts", shared=_ernie_shared),
            renamed={"mlp.gate.moe_statics": "mlp.gate", "mlp.shared_experts": _SHARED_EXPERT},
            rewrite=_IN_MLP,
        ),
        _ernie4_5_moe,
    ),
)

"""A small version of a model: the same class and the same options, few layers and narrow ones, random weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from rk_export.model.torch_models import stored_buffers

MOST_LAYERS = 8
VOCABULARY = 160
_HEADS, _HEAD_WIDTH = 4, 32
# Windows are so short that a short text crosses them.
_WINDOW = 8
_WINDOW_NAMES = ("window", "chunk")
_SIZES = {
    "hidden_size": _HEADS * _HEAD_WIDTH,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_attention_heads": _HEADS,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOST = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_num_experts": 4,
    "moe_k": 2,
}
_NO_FIELDS = ("model_type", "architectures", "transformers_version", "dtype", "quantization_config")
# Embeddings of trained models are about so small, which makes the epsilon of a norm count.
_EMBEDDING_SCALE = 0.02
_NOISE = 0.25


def tiny_version(config: PretrainedConfig) -> PretrainedConfig:
    """Return a config of the same class whose sizes are small and whose options are the same.

    Args:
        config: Of a decoder; it is not changed.

    Raises:
        Exception: Whatever the class raises on the sizes.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in _NO_FIELDS}
    values = copy.deepcopy(values)
    _take_layers(values, _own(config, "num_hidden_layers"))
    for name, size in _sizes(config).items():
        if (own := _own(config, name)) in values:
            values[own] = size
    for name, most in _MOST.items():
        if isinstance(value := values.get(name), int):
            values[name] = min(value, most)
    for name, value in values.items():
        is_window = any(part in name for part in _WINDOW_NAMES)
        if is_window and isinstance(value, int) and not isinstance(value, bool):
            values[name] = min(value, _WINDOW)
    if "rope_parameters" in values:
        values["rope_parameters"] = _narrow_rotation(values["rope_parameters"])
    return type(config)(**values)


def changed(config: PretrainedConfig, **fields: Any) -> PretrainedConfig:
    """Return a config with other values of some fields.

    Raises:
        Exception: Whatever the class raises on them.
    """
    values = {name: value for name, value in config.to_dict().items() if name not in _NO_FIELDS}
    return type(config)(**{**copy.deepcopy(values), **fields})


def random_model(
    config: PretrainedConfig, weights: Mapping[str, torch.Tensor] | None = None
) -> PreTrainedModel:
    """Return a model with random weights, norms around one, or with given ones: float32, eager attention.

    Raises:
        Exception: Whatever the class raises; the weights do not fit it.
    """
    with no_init_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", dtype=torch.float32, trust_remote_code=False
        ).eval()
    if weights is not None:
        model.load_state_dict(weights)
        return model
    generator = torch.Generator().manual_seed(0)
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = _deviation(parameter) * torch.randn(parameter.shape, generator=generator)
            is_gain = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(1.0 + noise if is_gain else noise)
        for _, buffer in stored_buffers(model):
            if buffer.is_floating_point():
                buffer.add_(_NOISE * torch.randn(buffer.shape, generator=generator))
        embedding.weight.mul_(_EMBEDDING_SCALE / _deviation(embedding.weight))
    return model


def _deviation(parameter: torch.Tensor) -> float:
    """Return how far random values spread: products of matrices stay of the size of their inputs."""
    return _NOISE if parameter.ndim < 2 else float(parameter.shape[-1] ** -0.5)


def _own(config: PretrainedConfig, name: str) -> str:
    """Return a config's own name of a common field."""
    return str(config.attribute_map.get(name, name))


def _sizes(config: PretrainedConfig) -> dict[str, int]:
    """Return the small sizes; queries share keys where they do in the model, and heads are as wide as there."""
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = getattr(config, "head_dim", None)
    sizes = dict(_SIZES)
    sizes["num_key_value_heads"] = _HEADS if kv_heads == heads else 1 if kv_heads == 1 else 2
    if width is not None:
        sizes["head_dim"] = _HEAD_WIDTH if width * heads == config.hidden_size else 2 * _HEAD_WIDTH
    return sizes


def _take_layers(values: dict[str, Any], name: str) -> None:
    """Keep few layers, of every kind that the lists with an entry for each layer tell apart."""
    count = int(values[name])
    lists = [key for key, value in values.items() if isinstance(value, list) and len(value) == count]
    kinds = [repr([values[key][index] for key in lists]) for index in range(count)]
    first = {kind: index for index, kind in reversed(list(enumerate(kinds)))}
    kept = sorted({*first.values(), *range(min(count, MOST_LAYERS))})
    values[name] = len(kept)
    for key in lists:
        values[key] = [values[key][index] for index in kept]


def _narrow_rotation(parameters: Any) -> Any:
    """Shorten the lists with a factor for each pair of rotated numbers."""
    if not isinstance(parameters, dict):
        return parameters
    share = parameters.get("partial_rotary_factor") or 1.0
    pairs = int(_HEAD_WIDTH * share) // 2
    result = {}
    for name, value in parameters.items():
        if isinstance(value, list) and len(value) > pairs:
            result[name] = value[:: len(value) // pairs][:pairs]
        else:
            result[name] = _narrow_rotation(value) if isinstance(value, dict) else value
    return result

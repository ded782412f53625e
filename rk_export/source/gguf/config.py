"""The transformers config that the metadata of a GGUF file describes."""

from __future__ import annotations

import logging
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.source.gguf.families import Family
from rk_export.source.gguf.file import GgufFile
from rk_export.source.gguf.rotary import rotary_parameters

logger = logging.getLogger(__name__)

_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
)
_TOKEN_KEYS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "unknown_token_id": "unk_token_id",
    "padding_token_id": "pad_token_id",
}
# Read elsewhere, or said by the tensors themselves.
_OTHER_KEYS = frozenset(
    (
        *("vocab_size", "attention.value_length", "attention.causal", "attention.sliding_window_pattern"),
        *("attention.scale", "embedding_scale", "residual_scale", "logit_scale"),
        *("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_weights_norm"),
        *("expert_gating_func", "expert_weights_scale"),
        *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear"),
    )
)


def config_of(source: GgufFile, family: Family) -> PretrainedConfig:
    """Build the transformers config from the file's metadata.

    Raises:
        InputError: A size that every model has is not in the file, or has no sense.
        UnsupportedModelError: Sizes differ between layers, or the model has an option that is not known.
    """
    values = _stated(source)
    _check_attention(source, values)
    _warn_of_unread_keys(source)
    if "token_embd.weight" not in source.tensors:
        raise InputError("the GGUF file holds no token embedding", where=str(source.path))
    values["vocab_size"] = _vocabulary(source)
    values["tie_word_embeddings"] = "output.weight" not in source.tensors
    values |= family.settings(source, values)
    rotary = rotary_parameters(source, values)
    try:
        config = AutoConfig.for_model(family.model_type, rope_parameters=rotary, **values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise InputError(
            f"the metadata makes no {family.model_type} config: {str(error).splitlines()[0]}",
            where=str(source.path),
        ) from error
    config.architectures = [family.model_class]
    config.dtype = _dtype(source)
    return config


def _stated(source: GgufFile) -> dict[str, Any]:
    """Return what the metadata states, under transformers' names; absent token ids are None."""
    for suffix in _REQUIRED:
        source.required(suffix)
    values = {name: source.model_key(suffix) for suffix, name in _CONFIG_KEYS.items()}
    for name, value in values.items():
        if isinstance(value, list):
            raise UnsupportedModelError(f"{name} differs between layers", where=str(source.path))
        if value is not None and not isinstance(value, int | float):
            raise InputError(f"{name} is {value!r}, no number", where=str(source.path))
    if values["rms_norm_eps"] is None and values["norm_epsilon"] is None:
        source.required("attention.layer_norm_rms_epsilon")
    stated = {name: value for name, value in values.items() if value is not None}
    heads = stated["num_attention_heads"]
    stated.setdefault("num_key_value_heads", heads)
    if not heads or not stated["num_key_value_heads"]:
        raise InputError("the metadata states no heads", where=str(source.path))
    stated.setdefault("head_dim", stated["hidden_size"] // heads)
    _check_layers(source, stated["num_hidden_layers"])
    if stated.get("sliding_window") == 0:  # llama.cpp's way to say that there is none
        stated["sliding_window"] = None
    return stated | {name: source.get(f"tokenizer.ggml.{suffix}") for suffix, name in _TOKEN_KEYS.items()}


def _check_layers(source: GgufFile, stated: int) -> None:
    """A damaged number of layers must not be built."""
    found = len({name.split(".")[1] for name in source.tensors if name.startswith("blk.")})
    if not 0 < stated <= found:
        raise InputError(
            f"the metadata states {stated} layers, the tensors are of {found}",
            where=str(source.path),
            fix="the file is incomplete: take another conversion of this model",
        )


def _check_attention(source: GgufFile, values: dict[str, Any]) -> None:
    """The decoder attends causally, with values as wide as keys."""
    if source.model_key("attention.causal") is False:
        raise UnsupportedModelError(
            "the model attends in both directions: it embeds texts and does not write them",
            where=f"{source.path}, key {source.architecture}.attention.causal",
        )
    width = source.model_key("attention.value_length", values["head_dim"])
    if width != values["head_dim"]:
        raise UnsupportedModelError(
            f"values have {width} entries a head and keys {values['head_dim']}", where=str(source.path)
        )


def _warn_of_unread_keys(source: GgufFile) -> None:
    """Say which statements about the model have no reader here: a newer llama.cpp may mean something by them."""
    prefix = source.architecture + "."
    suffixes = (key.removeprefix(prefix) for key in source.metadata if key.startswith(prefix))
    unread = [
        suffix
        for suffix in suffixes
        if suffix not in _CONFIG_KEYS and suffix not in _OTHER_KEYS and not suffix.startswith("rope.scaling.")
    ]
    if unread:
        stated = ", ".join(f"{suffix} = {source.model_key(suffix)}"[:80] for suffix in sorted(unread))
        logger.warning("%s: not read, and not known to change what it computes: %s", source.path.name, stated)


def _vocabulary(source: GgufFile) -> int:
    """Return the rows of the embedding, which may be more than the tokens that the tokenizer has."""
    rows = source.tensors["token_embd.weight"].shape[0]
    tokens = len(source.get("tokenizer.ggml.tokens", ()))
    if tokens > rows:
        raise InputError(
            f"the tokenizer has {tokens} tokens, the embedding {rows} rows",
            where=str(source.path),
            fix="the file is damaged: take another conversion of this model",
        )
    return rows


def _dtype(source: GgufFile) -> torch.dtype:
    """Return the matrices' own half precision, or float32 when any of them is quantized or float32."""
    kinds = {tensor.kind.name for tensor in source.tensors.values() if len(tensor.shape) > 1}
    return {("F16",): torch.float16, ("BF16",): torch.bfloat16}.get(tuple(kinds), torch.float32)

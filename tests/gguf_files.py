"""Writes GGUF files from transformers models by llama.cpp's conventions, with the gguf package alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tiny_models import tiny_model
from tokenizers import pre_tokenizers
from transformers import PreTrainedModel

VOCABULARY = [
    "<s>",
    "</s>",
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    "12",
    "he",
    "ll",
    "hell",
    "hello",
    "20",
]
MERGES = ["1 2", "h e", "l l", "he ll", "hell o", "2 0"]
ARCHITECTURES = {"gemma3_text": "gemma3", "qwen3_moe": "qwen3moe", "mixtral": "llama"}
INTERLEAVED = {"llama", "mixtral", "granite", "smollm3"}
OFFSET_NORMS = {"gemma2", "gemma3_text"}
Q8_0 = gguf.GGMLQuantizationType.Q8_0

Writer = gguf.GGUFWriter


def model_for_gguf(family: str, **changes: Any) -> PreTrainedModel:
    """Return a tiny model with the vocabulary of the files written here."""
    return tiny_model(
        family,
        **{"vocab_size": len(VOCABULARY), "pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
        | changes,
    )


def interleaved(W: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's row order of q and k."""
    return W.reshape(heads, 2, -1, *W.shape[1:]).swapaxes(1, 2).reshape(W.shape)


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    rule: str | None = "smollm",
    quantize: bool = False,
    extend: Callable[[Writer], None] = lambda writer: None,
    tokenizer: Callable[[Writer], None] | None = None,
    words: Sequence[str] = (),
    without: str = "",
    tensors: dict[str, np.ndarray] | None = None,
    **splitting: int,
) -> Path:
    """Write a model as a GGUF file.

    Args:
        path: The file, or the name that shards are called after.
        model: The model.
        rule: ``tokenizer.ggml.pre``, left out when None.
        quantize: Store matrices as Q8_0.
        extend: Adds metadata.
        tokenizer: Adds another tokenizer than the byte-level one.
        words: Put in place of the last words of the vocabulary.
        without: Tensor that is left out.
        tensors: Further tensors by name.
        **splitting: ``split_max_tensors`` for shards.
    """
    config = model.config
    family = config.model_type
    architecture = ARCHITECTURES.get(family, family)
    writer = Writer(path, architecture, **splitting)
    add_sizes(writer, config)
    add_options(writer, config)
    if tokenizer is None:
        add_tokenizer(writer, rule, words)
    else:
        tokenizer(writer)
    extend(writer)
    for name, values in stored_tensors(model, architecture):
        if name == without:
            continue
        kind = gguf.GGMLQuantizationType.F32
        if quantize and values.ndim > 1:
            kind, values = Q8_0, gguf.quantize(values, Q8_0)
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=kind)
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    finish(writer)
    return path


def finish(writer: Writer) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_sizes(writer: Writer, config: Any) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_epsilon)
    if getattr(config, "head_dim", None):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)


def add_options(writer: Writer, config: Any) -> None:
    """What the converter of each family writes beyond the sizes."""
    family, rotary = config.model_type, config.rope_parameters
    rotary = rotary.get("full_attention", rotary)
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rotary["rope_type"]))
        writer.add_rope_scaling_factor(rotary["factor"])
    if rotary["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rotary["original_max_position_embeddings"])
        if "beta_fast" in rotary:
            writer.add_rope_scaling_yarn_beta_fast(rotary["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rotary["beta_slow"])
    if family in OFFSET_NORMS and "sliding_attention" in config.layer_types:
        writer.add_sliding_window(config.sliding_window)
    if family == "granite":
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(config.logits_scaling)
    if family in ("qwen3_moe", "mixtral"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    if family == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            getattr(writer, f"add_{name}")(getattr(config, name))


def add_tokenizer(writer: Writer, rule: str | None, words: Sequence[str] = ()) -> None:
    vocabulary = [*VOCABULARY[: len(VOCABULARY) - len(words)], *words]
    writer.add_tokenizer_model("gpt2")
    if rule is not None:
        writer.add_tokenizer_pre(rule)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3, *[1] * (len(VOCABULARY) - 2)])
    writer.add_token_merges([merge for merge in MERGES if merge.replace(" ", "") in vocabulary])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def stored_tensors(model: PreTrainedModel, architecture: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors under llama.cpp's names and in its layout."""
    family, config = model.config.model_type, model.config
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    table = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        values = parameter.detach().numpy()
        experts = re.fullmatch(r"model\.layers\.(\d+)\.mlp\.experts\.(gate_up|down)_proj", name)
        if experts:
            block, parts = f"blk.{experts[1]}.ffn", experts[2].split("_")
            for part, stack in zip(parts, np.split(values, len(parts), axis=1), strict=True):
                yield f"{block}_{part}_exps.weight", stack
            continue
        stem, suffix = name.rsplit(".", 1)
        heads = re.search(r"\.([qk])_proj$", stem)
        if family in INTERLEAVED and heads:
            values = interleaved(
                values, config.num_attention_heads if heads[1] == "q" else config.num_key_value_heads
            )
        elif family in OFFSET_NORMS and name.endswith("norm.weight"):
            values = values + 1
        yield f"{table.get_name(stem)}.{suffix}", values


def largest_error(converted: PreTrainedModel, original: PreTrainedModel, tokens: int = 64) -> float:
    """Return the largest difference of logits relative to the largest logit, over two random texts."""
    ids = torch.randint(2, len(VOCABULARY), (2, tokens), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = converted(ids).logits, original(ids).logits
    return float((found - expected).abs().max() / expected.abs().max())

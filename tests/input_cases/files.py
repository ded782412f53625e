"""Folders as people have them: code, names, files, ties, leftovers, damage."""

from __future__ import annotations

import torch
from checkpoint_files import inside, multimodal, prefixed, sharded

from input_cases.case import Case
from input_cases.folders import (
    adapter_weights_alone,
    adding,
    backbone,
    broken_config,
    changed,
    config,
    grown,
    head,
    index_of_a_missing_file,
    lose_a_shard,
    no_config,
    pickled,
    planted,
    pointer,
    renamed,
    tensors,
    to,
    truncated,
    two_files,
    two_models,
    web_page,
    with_nan,
    without,
)

TIED = {"tie_word_embeddings": True}
UNTIED = {"tie_word_embeddings": False}
Q_PROJ = "model.layers.0.self_attn.q_proj"

CASES = (
    Case("config code", "config.json names code with auto_map", "refused", planted("config")),
    Case("tokenizer code", "tokenizer_config.json names code with auto_map", "refused", planted("tokenizer")),
    Case("generation code", "a custom_generate folder holds code", "refused", planted("decoding")),
    Case(
        "code of an unknown type",
        "auto_map beside a model type that transformers does not know",
        "refused",
        planted("config", model_type="evil"),
    ),
    Case(
        "tied, another head stored",
        "config.json ties the head to the embedding, and the file holds another head",
        "read",
        changed(head(0.3), own=True, **TIED),
    ),
    Case(
        "tied, an equal head stored",
        "config.json ties the head to the embedding, and the file holds a copy",
        "read",
        changed(head(0.0), own=True, **TIED),
    ),
    Case(
        "untied, no head stored",
        "config.json does not tie, and the file holds no head",
        "refused",
        changed(without("lm_head.weight"), **UNTIED),
    ),
    Case(
        "backbone, tied",
        "only the backbone was saved, and config.json ties its head",
        "read",
        changed(backbone, **TIED),
    ),
    Case(
        "backbone, untied",
        "only the backbone was saved, and config.json does not tie",
        "refused",
        changed(backbone, **UNTIED),
    ),
    Case(
        "leftover tensor",
        "a bias that the model has no place for",
        "refused",
        changed(adding(f"{Q_PROJ}.bias", 64)),
    ),
    Case(
        "leftover adapter",
        "pairs of an adapter that nobody merged",
        "refused",
        changed(adding(f"{Q_PROJ}.lora_A.default.weight", 4, 64)),
    ),
    Case("missing tensor", "a norm is missing", "refused", changed(without("model.norm.weight"))),
    Case(
        "classification head",
        "a score head lies beside the language model",
        "refused",
        changed(adding("score.weight", 2, 64)),
    ),
    Case(
        "classification model",
        "config.json says LlamaForSequenceClassification",
        "refused",
        changed(config(architectures=["LlamaForSequenceClassification"])),
    ),
    Case(
        "fewer layers than the file",
        "config.json says one layer, the file holds two",
        "refused",
        changed(config(num_hidden_layers=1)),
    ),
    Case(
        "more layers than the file",
        "config.json says three layers, the file holds two",
        "refused",
        changed(config(num_hidden_layers=3)),
    ),
    Case(
        "resized vocabulary",
        "the matrices have eight rows more than config.json says",
        "refused",
        changed(tensors(grown), **UNTIED),
    ),
    Case(
        "prefix of torch.compile",
        "every name begins with _orig_mod.",
        "read",
        changed(tensors(prefixed("_orig_mod."))),
    ),
    Case(
        "prefix of PEFT",
        "every name begins with base_model.model.",
        "read",
        changed(tensors(prefixed("base_model.model."))),
    ),
    Case(
        "prefix of multimodal models",
        "every name begins with language_model.",
        "read",
        changed(tensors(prefixed("language_model."))),
    ),
    Case("multimodal names", "names say model.language_model.", "read", changed(tensors(multimodal))),
    Case(
        "wrapped layers",
        "names of FSDP stand within the layers",
        "read",
        changed(tensors(inside("_fsdp_wrapped_module"))),
    ),
    Case("two models", "two encoders in one file", "refused", changed(tensors(two_models), family="bert")),
    Case(
        "buffers of old versions",
        "the file holds rotary frequencies",
        "read",
        changed(adding("model.layers.0.self_attn.rotary_emb.inv_freq", 8)),
    ),
    Case("shards without an index", "three numbered shards, no index", "read", changed(sharded)),
    Case("a shard is missing", "two of three numbered shards, no index", "refused", changed(lose_a_shard)),
    Case(
        "index of a missing file",
        "the index names a file that is not there",
        "refused",
        changed(index_of_a_missing_file),
    ),
    Case(
        "another file name",
        "the one file is called weights.safetensors",
        "read",
        changed(renamed("weights.safetensors")),
    ),
    Case("two unnumbered files", "two safetensors files of other names", "refused", changed(two_files)),
    Case(
        "Mistral's own format",
        "consolidated.safetensors alone",
        "refused",
        changed(renamed("consolidated.safetensors"), family="mistral"),
    ),
    Case(
        "MLX",
        "an MLX folder, quantized to 4 bits",
        "refused",
        changed(config(quantization={"group_size": 64, "bits": 4})),
    ),
    Case(
        "adapter without its config",
        "adapter_model.safetensors alone",
        "refused",
        changed(adapter_weights_alone),
    ),
    Case("pickles only", "pytorch_model.bin alone", "refused", changed(pickled)),
    Case("NaN", "one weight is NaN", "refused", changed(tensors(with_nan))),
    Case("truncated file", "half of model.safetensors", "refused", changed(truncated)),
    Case("pointer", "model.safetensors is a Git LFS pointer", "refused", changed(pointer)),
    Case("web page", "config.json is a web page", "refused", changed(web_page)),
    Case("broken config", "half of config.json", "refused", changed(broken_config)),
    Case("no config", "weights without config.json", "refused", changed(no_config)),
    Case("bfloat16", "every tensor in bfloat16", "read", changed(to(torch.bfloat16), own=True)),
    Case("float64", "every tensor in float64", "read", changed(to(torch.float64), own=True)),
    Case(
        "FP8 without scales",
        "matrices in FP8, and nothing says how",
        "refused",
        changed(to(torch.float8_e4m3fn, "proj")),
    ),
    Case(
        "unknown model type",
        "config.json says a type that transformers does not know",
        "refused",
        changed(config(model_type="unheard_of")),
    ),
    Case(
        "unknown activation",
        "config.json says an activation that transformers does not know",
        "refused",
        changed(config(hidden_act="bogus")),
    ),
    Case(
        "padding beyond the vocabulary",
        "pad_token_id is 1000, the vocabulary 160",
        "refused",
        changed(config(pad_token_id=1000)),
    ),
    Case(
        "unsupported family",
        "a family of transformers that is not exported",
        "refused",
        changed(config(model_type="mamba")),
    ),
    Case(
        "unsupported option",
        "a Llama whose activation is not exported",
        "refused",
        changed(config(hidden_act="tanh")),
    ),
)

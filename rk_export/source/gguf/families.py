"""Architectures that GGUF files are read for: what llama.cpp leaves out of a file, and how it lays tensors out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.source.gguf.file import GgufFile, models_in

Settings = dict[str, Any]


def _nothing(source: GgufFile, stated: Settings) -> Settings:
    return {}


@dataclass(frozen=True)
class Family:
    """How one architecture is stored.

    Attributes:
        model_type: Name of the transformers config.
        model_class: Name of the transformers class.
        interleaved: The rows of q and k are in pairs for interleaved rotary embedding.
        offset_norms: Norms hold 1 + w.
        expert_names: Names of an expert's gate, up and down matrices in a checkpoint; empty without experts.
        router: Name of the router in a checkpoint, below the layer.
        settings: Config values beyond those that all families state, from the file and the values read so far.
    """

    model_type: str
    model_class: str
    interleaved: bool = False
    offset_norms: bool = False
    expert_names: tuple[str, ...] = ()
    router: str = "mlp.gate"
    settings: Callable[[GgufFile, Settings], Settings] = _nothing


def _biases(source: GgufFile, stated: Settings) -> Settings:
    """Llama's two switches for biases; a file with only some of them keeps tensors without a place."""
    attention, mlp = ("attn_q", "attn_k", "attn_v", "attn_output"), ("ffn_gate", "ffn_up", "ffn_down")
    return {
        switch: all(f"blk.0.{part}.bias" in source.tensors for part in parts)
        for switch, parts in (("attention_bias", attention), ("mlp_bias", mlp))
    }


def _gemma2(source: GgufFile, stated: Settings) -> Settings:
    return {"query_pre_attn_scalar": _gemma_scale(stated, layers_of_27b=46)}


def _gemma3(source: GgufFile, stated: Settings) -> Settings:
    """Gemma 3: every sixth layer sees all positions unless the file says otherwise; without a window, all do."""
    layers = stated["num_hidden_layers"]
    pattern = source.model_key("attention.sliding_window_pattern", 6)
    if isinstance(pattern, int):
        pattern = [(index + 1) % pattern != 0 for index in range(layers)] if pattern else [True] * layers
    elif not isinstance(pattern, list) or len(pattern) != layers:
        raise InputError(
            f"gemma3.attention.sliding_window_pattern is {pattern!r}, nothing for {layers} layers",
            where=str(source.path),
        )
    window = stated.get("sliding_window")
    if not window:
        pattern, window = [False] * layers, stated["max_position_embeddings"]  # transformers wants a number
    return {
        "query_pre_attn_scalar": _gemma_scale(stated, layers_of_27b=62),
        "sliding_window": window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern],
    }


def _gemma_scale(stated: Settings, layers_of_27b: int) -> int:
    """Return the attention scale, absent from GGUF: hidden / heads for 27B, known by its layers, else the head."""
    if stated["num_hidden_layers"] == layers_of_27b:
        return int(stated["hidden_size"] // stated["num_attention_heads"])
    return int(stated["head_dim"])


def _granite(source: GgufFile, stated: Settings) -> Settings:
    """Granite's four multipliers; an absent or zero one means what llama.cpp does without it."""
    if source.model_key("rope.scaling.finetuned") is False:
        raise UnsupportedModelError(
            "this Granite model rotates no positions",
            where=f"{source.path}, key granite.rope.scaling.finetuned",
            fix="use the Hugging Face checkpoint of this model",
        )
    return _biases(source, stated) | {
        "attention_multiplier": source.number("attention.scale") or stated["head_dim"] ** -0.5,
        "embedding_multiplier": source.number("embedding_scale") or 1.0,
        "residual_multiplier": source.number("residual_scale") or 1.0,
        "logits_scaling": source.number("logit_scale") or 1.0,
    }


def _check_router(source: GgufFile) -> None:
    """The router takes a softmax and scales nothing, in both families with experts."""
    softmax = (0, 1)
    for name, accepted in (("expert_gating_func", softmax), ("expert_weights_scale", (0.0, 1.0))):
        value = source.number(name)
        if value is not None and value not in accepted:
            raise UnsupportedModelError(
                f"a router with {name} {value} cannot be converted",
                where=f"{source.path}, key {source.architecture}.{name}",
                fix="use the Hugging Face checkpoint of this model",
            )


def _qwen3moe(source: GgufFile, stated: Settings) -> Settings:
    _check_router(source)
    return {
        "num_experts": source.required("expert_count"),
        "num_experts_per_tok": source.required("expert_used_count"),
        "moe_intermediate_size": source.required("expert_feed_forward_length"),
        "norm_topk_prob": source.model_key(
            "expert_weights_norm", True
        ),  # llama.cpp normalizes when it is absent
    }


def _mixtral(source: GgufFile, stated: Settings) -> Settings:
    _check_router(source)
    return {
        "num_local_experts": source.required("expert_count"),
        "num_experts_per_tok": source.required("expert_used_count"),
    }


def _phi3(source: GgufFile, stated: Settings) -> Settings:
    original = source.number("rope.scaling.original_context_length")
    return {"original_max_position_embeddings": original} if original else {}


def _olmo2(source: GgufFile, stated: Settings) -> Settings:
    if stated.get("sliding_window"):
        raise UnsupportedModelError(
            "this is Olmo 3, whose layers slide; GGUF is read for Olmo 2",
            where=f"{source.path}, key olmo2.attention.sliding_window",
            fix="use the Hugging Face checkpoint of this model",
        )
    return {}


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", interleaved=True, settings=_biases),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM"),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM"),
    "qwen3moe": Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        expert_names=("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj", "mlp.experts.{}.down_proj"),
        settings=_qwen3moe,
    ),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", offset_norms=True, settings=_gemma2),
    "gemma3": Family("gemma3_text", "Gemma3ForCausalLM", offset_norms=True, settings=_gemma3),
    "granite": Family("granite", "GraniteForCausalLM", interleaved=True, settings=_granite),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", settings=_olmo2),
    "phi3": Family("phi3", "Phi3ForCausalLM", settings=_phi3),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", interleaved=True),
    "starcoder2": Family("starcoder2", "Starcoder2ForCausalLM"),
}
_MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    interleaved=True,
    expert_names=tuple(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2")),
    router="block_sparse_moe.gate",
    settings=_mixtral,
)


def family_of(source: GgufFile) -> Family:
    """Return the family of a GGUF file; llama.cpp stores Mixtral as a llama with experts.

    Raises:
        UnsupportedModelError: The file holds no language model, or one of an architecture that is not read.
    """
    kind = source.get("general.type", "model")
    if kind != "model" or source.architecture == "clip":
        raise UnsupportedModelError(
            f"the GGUF file holds no language model (general.type {kind!r}, architecture {source.architecture!r})",
            where=str(source.path),
            fix=_language_model_beside(source),
        )
    if source.architecture == "llama" and (source.number("expert_count") or 0) > 0:
        return _MIXTRAL
    if source.architecture not in FAMILIES:
        raise UnsupportedModelError(
            f"GGUF architecture {source.architecture!r} cannot be converted",
            where=str(source.path),
            fix=f"use the Hugging Face checkpoint; GGUF is read for {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[source.architecture]


def _language_model_beside(source: GgufFile) -> str:
    others = [path.name for path in models_in(source.path.parent) if path not in source.paths]
    return (
        f"name the language model's file: {', '.join(others[:4])}"
        if others
        else "name the language model's file"
    )

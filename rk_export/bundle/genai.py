"""``genai_config.json``: how onnxruntime-genai 0.18 finds and feeds the graph of a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from transformers import GenerationConfig, PretrainedConfig

from rk_export.errors import InputError
from rk_export.model.context import own_context
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.registry import decoder_spec
from rk_export.runtime.bundle_config import rotary_switch

# Families that onnxruntime-genai 0.18 names and runs as plain decoders. gpt2 is left out on purpose: its type
# there expects one combined past tensor per layer, not the key / value pairs of our graphs.
_GENAI_TYPES = frozenset(
    [
        *(
            "ernie4_5",
            "gemma",
            "gemma2",
            "gemma3_text",
            "granite",
            "internlm2",
            "llama",
            "mistral",
            "nemotron",
        ),
        *("lfm2", "olmo", "phi", "phi3", "qwen2", "qwen3", "smollm3"),
    ]
)

# What GenAI's own builder (0.18) writes for CUDA, and no more. The values are strings: GenAI refuses numbers.
# - enable_cuda_graph is off. With a captured graph GenAI feeds a mask of always `search.max_length` columns, and our
#   graph reads the length of the text from that width: LongRoPE would take its long factors at once, and each step
#   would make a bias of the full width.
# - enable_skip_layer_norm_strict_mode is left out. ONNX Runtime 1.31, which GenAI 0.18 needs, ignores it: the fused sum
#   and norm of our graph always adds up in fp32 there (microsoft/onnxruntime #28682, #29388).
# - The session option "ep.cuda.fpa_intb_gemm" is left out. "1" gives products in 4 or 8 bits another kernel than
#   rk-export's runtime and the parity tiers use. Only symmetric blocks of 32 without bias have one in ONNX Runtime's
#   packages. docs/how-to/deploy.md says how to turn it on.
_CUDA_OPTIONS = {"enable_cuda_graph": "0"}

# GenAI allocates keys and values for `search.max_length` positions before the first token, whatever the text needs.
MOST_BUFFER_BYTES = 512 * 2**20
MOST_POSITIONS = 4096
_ROUND_TO = 64


def genai_config(
    config: PretrainedConfig,
    *,
    ep: Literal["cpu", "cuda"],
    context_length: int,
    generation: GenerationConfig | None = None,
    filename: str = "model.onnx",
    spec: DecoderSpec | None = None,
) -> dict[str, Any]:
    """Return ``genai_config.json`` for onnxruntime-genai.

    Args:
        config: Configuration of the exported model.
        ep: Execution provider that the session is made with.
        context_length: Tokens of prompt and answer together; a search may ask for as many.
        generation: Defaults of sampling and the token ids that end a text; the config's own where None.
        filename: The graph, relative to the bundle.
        spec: What the decoder computes; None reads it from the config.
    """
    spec = decoder_spec(config) if spec is None else spec
    defaults = generation if generation is not None else GenerationConfig.from_model_config(config)
    ends = _tokens("eos_token_id", config, defaults)
    if not ends:
        raise InputError(
            "no eos_token_id: generation could not stop", where="config.json", fix="add eos_token_id to it"
        )
    pad = next(iter(_tokens("pad_token_id", config, defaults)), ends[0])
    return {
        "model": {
            "bos_token_id": next(iter(_tokens("bos_token_id", config, defaults)), pad),
            "context_length": context_length,
            "decoder": _decoder(config, spec, ep, filename),
            "eos_token_id": ends[0] if len(ends) == 1 else ends,
            "pad_token_id": pad,
            "type": config.model_type if config.model_type in _GENAI_TYPES else "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": _search(defaults, default_length(spec, ep, context_length)),
    }


def exact_length(config: PretrainedConfig) -> int:
    """Return up to how many tokens of prompt and answer onnxruntime-genai generates what the model does.

    That is the context length, unless LongRoPE changes its factors on the way and the cached keys would keep the old
    rotation.
    """
    switch = rotary_switch(config.to_dict())
    longest = own_context(config)
    return longest if switch is None or _follows_switch(config, switch) else switch


def length_note(config: PretrainedConfig) -> str | None:
    """Return, for people, up to which length which runtime generates exactly; None where all do without a limit."""
    switch = rotary_switch(config.to_dict())
    if switch is None:
        return None
    genai = (
        "ONNX Runtime GenAI does so in batches of one"
        if _follows_switch(config, switch)
        else "genai_config.json ends generation there"
    )
    return (
        f"LongRoPE rotates texts of more than {switch} tokens by other factors. Every runtime generates exactly up to "
        f"{switch} tokens of prompt and answer together, and after a prompt that is longer than that. In between, the "
        f"cache must be computed anew once, at token {switch + 1}: rk-export's runtime does so; {genai}; other "
        "runtimes keep the old rotation in the cache, and their text differs from there on."
    )


def _follows_switch(config: PretrainedConfig, switch: int) -> bool:
    """Whether onnxruntime-genai computes the cache anew: 0.18 does so at this length for this type of model."""
    return config.model_type == "phi3" and switch == 4096


def default_length(spec: DecoderSpec, ep: Literal["cpu", "cuda"], context_length: int) -> int:
    """Return the length of a search that does not name one: its buffer of keys and values stays affordable.

    Args:
        spec: Of the decoder.
        ep: Execution provider; numbers count as float16 on CUDA and as float32 elsewhere.
        context_length: The most that a search may ask for.

    Returns:
        Positions: at most `MOST_POSITIONS`, and as many as `MOST_BUFFER_BYTES` hold for one row.
    """
    float_bytes = 4 if ep == "cpu" else 2
    position_bytes = 2 * len(spec.attention_layers) * spec.heads.kv_heads * spec.heads.head_dim * float_bytes
    held = max(_ROUND_TO, MOST_BUFFER_BYTES // position_bytes // _ROUND_TO * _ROUND_TO)
    return int(min(context_length, MOST_POSITIONS, held))


def write_genai_config(folder: Path, values: dict[str, Any]) -> None:
    """Write ``genai_config.json`` into a bundle."""
    (folder / "genai_config.json").write_text(json.dumps(values, indent=4) + "\n", encoding="utf-8")


def _tokens(name: str, config: PretrainedConfig, defaults: GenerationConfig) -> list[int]:
    """Return the ids of a special token, the generation defaults' before the config's; -1 and the like are none."""
    for source in (defaults, config):
        value = getattr(source, name, None)
        ids = [token for token in (value if isinstance(value, list) else [value]) if token is not None]
        if valid := [token for token in ids if 0 <= token < config.vocab_size]:
            return valid
    return []


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _decoder(
    config: PretrainedConfig, spec: DecoderSpec, ep: Literal["cpu", "cuda"], filename: str
) -> dict[str, Any]:
    heads, states = spec.heads, _states(spec)
    return {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [] if ep == "cpu" else [{ep: dict(_CUDA_OPTIONS)}],
        },
        "filename": filename,
        "head_size": heads.head_dim,
        "hidden_size": config.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
            **states.inputs,
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
            **states.outputs,
        },
        "num_attention_heads": heads.heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": heads.kv_heads,
        **states.layers,
    }


class _States(NamedTuple):
    """What GenAI is told of layers that carry a state: fields of the decoder, of its inputs and of its outputs."""

    layers: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, str]


def _states(spec: DecoderSpec) -> _States:
    if not spec.conv_layers:
        return _States({}, {}, {})
    kinds = {"attention": "full_attention", "short_conv": "conv"}
    return _States(
        {"layer_types": [kinds[layer.mixer] for layer in spec.layers], "conv_cache_size": spec.conv_taps},
        {"past_conv_names": "past_conv.%d"},
        {"present_conv_names": "present_conv.%d"},
    )


def _search(defaults: GenerationConfig, max_length: int) -> dict[str, Any]:
    return {
        "do_sample": bool(defaults.do_sample),
        "early_stopping": True,
        "max_length": max_length,
        "min_length": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": True,
        "repetition_penalty": _first_set(defaults.repetition_penalty, 1.0),
        "temperature": _first_set(defaults.temperature, 1.0),
        "top_k": _first_set(defaults.top_k, 50),
        "top_p": _first_set(defaults.top_p, 1.0),
    }

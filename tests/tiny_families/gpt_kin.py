"""Decoders in the manner of GPT: LayerNorm, no gate, matrices joined in many ways."""

from tiny_families.entry import TinyFamily

_PARTIAL = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
    "hidden_size": 128,
}
_NO_GROUPS: dict[str, str | None] = {"num_key_value_heads": None}
_OLD_NAMES: dict[str, str | None] = {**_NO_GROUPS, "intermediate_size": "n_inner"}
_FALCON: dict[str, str | None] = {
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "ffn_hidden_size",
}
_ALIBI: dict[str, str | None] = {**_NO_GROUPS, "intermediate_size": None}

FAMILIES = (
    TinyFamily(
        "gpt_neo",
        fields={"attention_types": [[["global", "local"], 1]], "window_size": 5},
        spelled=_NO_GROUPS,
        known=("GPT-Neo 125M to 2.7B", "TinyStories"),
    ),
    TinyFamily(
        "gpt_bigcode",
        spelled={**_OLD_NAMES, "num_attention_heads": "n_head"},
        variants={"all_heads": {"multi_query": False}, "unscaled": {"scale_attn_weights": False}},
        known=("StarCoder", "SantaCoder"),
    ),
    TinyFamily(
        "gpt_neox",
        fields=_PARTIAL,
        spelled=_NO_GROUPS,
        variants={
            "sequential": {"use_parallel_residual": False},
            "unbiased": {"attention_bias": False},
            "fast_gelu": {"hidden_act": "gelu_fast"},
        },
        known=("Pythia", "GPT-NeoX-20B", "Dolly"),
    ),
    TinyFamily(
        "stablelm",
        fields=_PARTIAL,
        variants={
            "parallel": {"use_parallel_residual": True, "use_qkv_bias": True},
            "normed": {"qk_layernorm": True},
        },
        known=("StableLM 3B", "StableLM 2"),
    ),
    TinyFamily(
        "gptj",
        fields={"rotary_dim": 8},
        spelled=_OLD_NAMES,
        variants={"rotated_16": {"rotary_dim": 16, "hidden_size": 128}},
        known=("GPT-J 6B",),
    ),
    TinyFamily(
        "codegen",
        fields={"rotary_dim": 16, "num_attention_heads": 8, "hidden_size": 192},
        spelled=_OLD_NAMES,
        known=("CodeGen 350M to 16B",),
    ),
    TinyFamily(
        "falcon",
        spelled=_FALCON,
        variants={
            "new": {"new_decoder_architecture": True},
            "new_one_norm": {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "bias": True},
            "all_heads": {"multi_query": False, "num_kv_heads": 4, "parallel_attn": False, "bias": True},
        },
        known=("Falcon 7B", "Falcon 40B", "Falcon 2 11B"),
    ),
    TinyFamily(
        "bloom",
        spelled={**_ALIBI, "max_position_embeddings": "seq_length"},
        variants={"six_heads": {"num_attention_heads": 6, "hidden_size": 96}},
        known=("BLOOM", "BLOOMZ"),
    ),
    TinyFamily(
        "mpt",
        fields={"attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.4}},
        spelled={**_ALIBI, "max_position_embeddings": "max_seq_len"},
        variants={"six_heads": {"num_attention_heads": 6, "hidden_size": 96, "attn_config": {}}},
        known=("MPT-7B", "MPT-30B"),
    ),
)

"""Llama with something more in attention or in the MLP."""

from rope_configs import DYNAMIC

from tiny_families.entry import TinyFamily

_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}

FAMILIES = (
    TinyFamily(
        "ministral3",
        fields={"head_dim": 32, "rope_parameters": _YARN},
        variants={"window": {"sliding_window": 5}},
        known=("Ministral 3 3B, 8B and 14B",),
    ),
    TinyFamily(
        "hunyuan_v1_dense",
        fields={"head_dim": 32},
        variants={"alpha": {"rope_parameters": {**DYNAMIC, "alpha": 50.0}}},
        known=("HunYuan dense 0.5B to 7B", "HY-MT"),
    ),
    TinyFamily(
        "olmo",
        fields={"clip_qkv": 1.5},
        variants={"unclipped": {"clip_qkv": None}},
        known=("OLMo 1B and 7B",),
    ),
    TinyFamily(
        "nemotron",
        fields={
            "head_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5},
        },
        known=("Nemotron-Mini-4B", "Minitron"),
    ),
    TinyFamily("bitnet", known=("BitNet b1.58 2B4T",)),
)

"""Mixtures of experts."""

from tiny_families.entry import TinyFamily

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GRANITE = {
    **_EXPERTS,
    "num_experts_per_tok": 3,
    "attention_bias": True,
    "embedding_multiplier": 2.5,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
}
_LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 8,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.2 * i for i in range(8)],
    "short_mscale": 1.25,
    "long_mscale": 1.25,
}

FAMILIES = (
    TinyFamily("mixtral", fields=_EXPERTS, known=("Mixtral 8x7B",), in_sample=True),
    TinyFamily(
        "qwen3_moe",
        fields={**_EXPERTS, "head_dim": 32, "moe_intermediate_size": 48, "norm_topk_prob": True},
        known=("Qwen3-30B-A3B",),
        in_sample=True,
    ),
    TinyFamily(
        "qwen2_moe",
        fields={
            "num_hidden_layers": 3,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 96,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
        variants={"normalized": {"norm_topk_prob": True, "use_sliding_window": False}},
        known=("Qwen1.5-MoE-A2.7B", "Qwen2-57B-A14B"),
    ),
    TinyFamily(
        "olmoe",
        fields={"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 48},
        variants={"normalized": {"norm_topk_prob": True}, "clipped": {"clip_qkv": 1.5}},
        known=("OLMoE-1B-7B",),
    ),
    TinyFamily("granitemoe", fields=_GRANITE, known=("Granite 3.0 1B-A400M", "Granite 3.0 3B-A800M")),
    TinyFamily(
        "granitemoeshared",
        fields={**_GRANITE, "shared_intermediate_size": 96},
        variants={"none-shared": {"shared_intermediate_size": 0}},
        known=("Granite MoE with a shared expert",),
    ),
    TinyFamily(
        "phimoe",
        fields={**_EXPERTS, "attention_bias": True, "router_jitter_noise": 0.2, "lm_head_bias": True},
        variants={"long": {"rope_parameters": _LONG_ROPE, "sliding_window": 6}},
        known=("Phi-3.5-MoE", "Phi-mini-MoE"),
    ),
    TinyFamily(
        "ernie4_5_moe",
        fields={
            "num_hidden_layers": 3,
            "head_dim": 32,
            "moe_num_experts": 5,
            "moe_k": 3,
            "moe_intermediate_size": 32,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_norm_min": 0.9,
            "use_bias": True,
            "tie_word_embeddings": False,
        },
        variants={
            "none-shared": {
                "moe_num_shared_experts": 0,
                "moe_layer_interval": 2,
                "use_bias": False,
                "tie_word_embeddings": True,
            }
        },
        known=("ERNIE 4.5 21B-A3B",),
    ),
)

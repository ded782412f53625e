"""Llama and those that differ from it by a field or two."""

from rope_configs import DYNAMIC, LLAMA3, YARN

from tiny_families.entry import TinyFamily

FAMILIES = (
    TinyFamily(
        "llama",
        variants={"width_24": {"head_dim": 24}},
        known=("Llama 2 and 3", "SmolLM2", "TinyLlama", "DeepSeek-R1-Distill-Llama"),
        in_sample=True,
    ),
    TinyFamily(
        "mistral",
        fields={"head_dim": 16, "sliding_window": 5},
        known=("Mistral 7B", "Mistral Nemo"),
        in_sample=True,
    ),
    TinyFamily("qwen2", known=("Qwen2", "Qwen2.5", "DeepSeek-R1-Distill-Qwen"), in_sample=True),
    TinyFamily("qwen3", fields={"head_dim": 32}, known=("Qwen3",), in_sample=True),
    TinyFamily(
        "phi3",
        variants={
            "rotated_8": {
                "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
            }
        },
        known=("Phi-3", "Phi-3.5-mini", "Phi-4", "Phi-4-mini"),
        in_sample=True,
    ),
    TinyFamily("olmo2", known=("OLMo 2",), in_sample=True),
    TinyFamily(
        "smollm3",
        fields={"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
        known=("SmolLM3",),
        in_sample=True,
    ),
    TinyFamily(
        "ministral",
        fields={"head_dim": 32, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
        known=("Ministral 8B (2410)",),
    ),
    TinyFamily(
        "cwm",
        fields={
            "head_dim": 32,
            "sliding_window": 5,
            "layer_types": ["full_attention", "sliding_attention"],
            "rope_parameters": LLAMA3,
        },
        known=("Code World Model (32B)",),
    ),
    TinyFamily(
        "olmo3",
        fields={
            "num_hidden_layers": 4,
            "sliding_window": 5,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
        known=("OLMo 3 (7B, 32B)",),
    ),
    TinyFamily(
        "seed_oss",
        fields={"head_dim": 32, "attention_out_bias": True, "mlp_bias": True},
        known=("Seed-OSS-36B",),
    ),
    TinyFamily(
        "internlm3",
        fields={"head_dim": 32, "rope_parameters": DYNAMIC, "attention_bias": True, "mlp_bias": True},
        known=("InternLM3-8B",),
    ),
    TinyFamily(
        "ernie4_5",
        fields={"head_dim": 32},
        variants={"untied": {"tie_word_embeddings": False, "use_bias": True, "head_dim": 16}},
        known=("ERNIE 4.5 0.3B",),
    ),
    TinyFamily("helium", fields={"head_dim": 16}, known=("Helium 1 (2B)",)),
    TinyFamily("iquestcoder", fields={"head_dim": 32}, known=("IQuest-Coder-V1",)),
)

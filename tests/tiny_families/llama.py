"""Llama and those that differ from it by a field or two."""

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
        "granite",
        fields={
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.6,
            "logits_scaling": 2.5,
        },
        known=("Granite 3",),
        in_sample=True,
    ),
    TinyFamily(
        "smollm3",
        fields={"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
        known=("SmolLM3",),
        in_sample=True,
    ),
)

"""Decoders whose attention and MLP stand side by side behind one norm."""

from tiny_families.entry import TinyFamily

FAMILIES = (
    TinyFamily(
        "phi",
        fields={
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
        },
        variants={"normed": {"qk_layernorm": True}},
        known=("Phi-1", "Phi-1.5", "Phi-2"),
    ),
    TinyFamily(
        "cohere",
        fields={"logit_scale": 0.4},
        variants={"normed": {"use_qk_norm": True}},
        known=("Command R", "Aya 23"),
    ),
    TinyFamily(
        "cohere2",
        fields={
            "logit_scale": 0.4,
            "sliding_window": 5,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
        },
        known=("Command R7B", "Command A", "Aya Expanse"),
    ),
)

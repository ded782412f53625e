"""Decoders with multipliers: on the embedding, attention, the residual stream and the logits."""

from tiny_families.entry import TinyFamily

_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.4,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.5,
}

# Attention that is not sharp: rounding would grow in it.
_SOFT = {**_MULTIPLIERS, "attention_multiplier": 0.1}

FAMILIES = (
    TinyFamily("granite", fields=_MULTIPLIERS, known=("Granite 3",), in_sample=True),
    TinyFamily(
        "granitemoehybrid",
        fields={
            **_SOFT,
            "num_local_experts": 0,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "rope",
            "mamba_n_heads": 8,
        },
        spelled={"intermediate_size": "shared_intermediate_size"},
        variants={"unrotated": {"position_embedding_type": "nope", "attention_bias": True}},
        known=("Granite 4 (those without Mamba layers, such as 4.0 Micro)",),
    ),
    TinyFamily(
        "hyperclovax",
        fields={**_SOFT, "head_dim": 32},
        variants={"pre_norm": {"use_post_norm": False, "attention_bias": True, "mlp_bias": True}},
        known=("HyperCLOVA X SEED Think 14B",),
    ),
)

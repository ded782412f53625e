"""Mixtures of experts."""

from tiny_families.entry import TinyFamily

_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

FAMILIES = (
    TinyFamily("mixtral", fields=_EXPERTS, known=("Mixtral 8x7B",), in_sample=True),
    TinyFamily(
        "qwen3_moe",
        fields={**_EXPERTS, "head_dim": 32, "moe_intermediate_size": 48, "norm_topk_prob": True},
        known=("Qwen3-30B-A3B",),
        in_sample=True,
    ),
)

"""Llama-like decoders with an MLP without gate."""

from rope_configs import LLAMA3

from tiny_families.entry import TinyFamily

FAMILIES = (
    TinyFamily("arcee", fields={"head_dim": 32, "mlp_bias": True}, known=("AFM-4.5B",)),
    TinyFamily("jais2", fields={"head_dim": 32}, known=("Jais 2 8B and 70B",)),
    TinyFamily(
        "apertus",
        fields={"head_dim": 32, "rope_parameters": LLAMA3},
        variants={"silu": {"hidden_act": "silu", "attention_bias": True}},
        known=("Apertus 8B and 70B",),
    ),
)

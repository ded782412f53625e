"""Decoders with LayerNorm and an MLP without gate."""

from tiny_families.entry import TinyFamily

FAMILIES = (
    TinyFamily("starcoder2", known=("StarCoder2",), in_sample=True),
    TinyFamily(
        "gpt2",
        spelled={
            "intermediate_size": "n_inner",
            "num_key_value_heads": None,
            "max_position_embeddings": "n_positions",
        },
        known=("GPT-2", "DistilGPT2"),
        in_sample=True,
    ),
    TinyFamily(
        "opt",
        fields={"word_embed_proj_dim": 64},
        spelled={"intermediate_size": "ffn_dim", "num_key_value_heads": None},
        known=("OPT",),
        in_sample=True,
    ),
)

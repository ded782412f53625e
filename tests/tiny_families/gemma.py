"""Google's decoders: norms that store their gain minus one, scaled embeddings, windows by layer."""

from tiny_families.entry import TinyFamily

_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 5, "num_hidden_layers": 4}

FAMILIES = (
    TinyFamily(
        "gemma",
        fields={"head_dim": 32},
        variants={"untied": {"tie_word_embeddings": False, "attention_bias": True}},
        known=("Gemma", "CodeGemma", "the text of PaliGemma"),
    ),
    TinyFamily(
        "vaultgemma",
        fields={**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
        known=("VaultGemma",),
    ),
    TinyFamily(
        "gemma2",
        fields={**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
        known=("Gemma 2",),
        in_sample=True,
    ),
    TinyFamily(
        "gemma3",
        model_type="gemma3_text",
        fields={**_GEMMA, "layer_types": ["sliding_attention", "full_attention"] * 2},
        known=("Gemma 3 (270M and 1B, the text of 4B to 27B)",),
        in_sample=True,
    ),
)

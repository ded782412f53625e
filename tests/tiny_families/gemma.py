"""Google's decoders: norms that store their gain minus one, scaled embeddings, windows by layer."""

import torch
from transformers import PreTrainedModel

from tiny_families.entry import TinyFamily

_GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 24, "sliding_window": 5, "num_hidden_layers": 4}


@torch.no_grad()
def _gains_around_one(model: PreTrainedModel) -> None:
    """Gains are stored minus one: those around two would make attention sharp, and rounding grow in it."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.sub_(1.0)


FAMILIES = (
    TinyFamily(
        "gemma",
        fields={"head_dim": 32},
        variants={"untied": {"tie_word_embeddings": False, "attention_bias": True}},
        known=("Gemma", "CodeGemma"),
        finish=_gains_around_one,
    ),
    TinyFamily(
        "vaultgemma",
        fields={**_GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0},
        known=("VaultGemma",),
        finish=_gains_around_one,
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

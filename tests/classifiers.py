"""Tiny random classifiers on encoders: of texts, and of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_config, transformers_own
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

SEQUENCE, TOKENS = "texts", "tokens"
CLASSES: dict[str, Any] = {
    SEQUENCE: AutoModelForSequenceClassification,
    TOKENS: AutoModelForTokenClassification,
}


def saved_classifier(
    name: str, head: str, folder: Path, labels: int = 3, **overrides: Any
) -> PreTrainedModel:
    """Save a family's classifier with random weights; return it as transformers loads it.

    Args:
        name: Of the family, or of its variant.
        head: `SEQUENCE` or `TOKENS`.
        folder: Where to.
        labels: How many.
        **overrides: Fields of the config.
    """
    config = tiny_config(name, num_labels=labels, **overrides)
    model: PreTrainedModel = CLASSES[head].from_config(config, attn_implementation="eager").float().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and parameter_name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.25 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return transformers_own(folder, CLASSES[head])

"""LoRA adapters with random values, made by PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import change_json
from tiny_models import transformers_own

peft = pytest.importorskip("peft")

ATTENTION = ["q_proj", "v_proj"]


def trained(base: Path, adapter: Path, **fields: Any) -> Any:
    """Save an adapter whose every trainable value is random; return peft's model of it."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, **fields})
    model = peft.get_peft_model(transformers_own(base), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                centre = parameter if "magnitude" in name else 0.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(adapter)
    return peft.PeftModel.from_pretrained(transformers_own(base), adapter).eval()


def edit_adapter(adapter: Path, **changes: Any) -> None:
    """Change or add entries of adapter_config.json."""
    change_json(adapter / "adapter_config.json", **changes)

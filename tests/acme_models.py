"""A model type that only the tests know: a Llama with options of its own, and one rule that no config tells."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

# Logits beyond it are cut off, whatever the config says; those of tiny random models are far below.
HIDDEN_LIMIT = 1000.0


class AcmeConfig(LlamaConfig):
    """A Llama's, and what happens to the logits."""

    model_type = "acme"
    logit_factor: float = 1.0
    logit_limit: float = 0.0
    logit_cap: float | None = None
    flavour: str = "plain"
    unused_number: int = 7


class AcmeForCausalLM(LlamaForCausalLM):
    """A Llama whose logits are scaled, limited and capped."""

    config_class = AcmeConfig

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        logits = output.logits * self.config.logit_factor
        if self.config.logit_limit:
            logits = logits.clamp(-self.config.logit_limit, self.config.logit_limit)
        if self.config.logit_cap:
            logits = self.config.logit_cap * torch.tanh(logits / self.config.logit_cap)
        output.logits = logits.clamp(-HIDDEN_LIMIT, HIDDEN_LIMIT)
        return output


AutoConfig.register("acme", AcmeConfig, exist_ok=True)
AutoModelForCausalLM.register(AcmeConfig, AcmeForCausalLM, exist_ok=True)

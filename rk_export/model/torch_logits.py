"""A PyTorch model as a function from tokens to logits."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.model.context import own_context
from rk_export.runtime.token_gate import TokenGate
from rk_export.text import LogitsFn


def torch_logits(model: PreTrainedModel) -> LogitsFn:
    """Return a function from token ids (batch, length) to a PyTorch model's output (batch, length, width).

    It raises InputError for tokens without a row in the embedding, and for more of them than the model has positions.
    """
    config = model.config.get_text_config(decoder=True)
    gate = TokenGate(config.vocab_size, own_context(config))

    @torch.no_grad()
    def logits(ids: np.ndarray) -> Tensor:
        gate.check(ids)
        output = model(input_ids=torch.as_tensor(ids), use_cache=False)
        result: Tensor = output.logits if "logits" in output else output.last_hidden_state
        return result

    return logits

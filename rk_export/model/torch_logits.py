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
        return output_of(model, torch.as_tensor(ids))

    return logits


def output_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return a model's output on token ids (batch, length): logits or hidden states, (batch, length, width).

    A classifier of texts answers once: (batch, 1, labels).
    """
    output = model(input_ids=ids, **without_cache(model))
    result: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return result[:, None] if result.ndim == 2 else result


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return the keywords that keep a model from making a cache; a class that makes none may not know them."""
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}

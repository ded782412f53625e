"""What a model's tensors are known by: its files, or the values in memory."""

from __future__ import annotations

import hashlib
import itertools
import json

import torch
from transformers import PreTrainedModel

from rk_export.folders import sha256_of
from rk_export.source.stored import ModelSource


def weights_fingerprint(source: ModelSource) -> str:
    """Return the SHA-256 over the files that decide what a source's tensors are, and over its variant."""
    digests = [sha256_of(path) for path in source.files]
    if source.variant:
        digests.append(source.variant)
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def model_fingerprint(model: PreTrainedModel) -> str:
    """Return the SHA-256 over a model's configuration and its parameters and buffers, as they are in memory."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()

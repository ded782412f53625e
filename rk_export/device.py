"""The device that factorization, quantization and training run on."""

from __future__ import annotations

import re

import torch

from rk_export.errors import InputError, ProviderError


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu`, `cuda` or `cuda:N` means here.

    Raises:
        ProviderError: If CUDA was asked for and PyTorch cannot use it.
        InputError: If the name is none of these.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name != "cpu" and not re.fullmatch(r"cuda(:\d+)?", name):
        raise InputError(f"unknown device {name!r}", where="--device", fix="choose auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ProviderError(
            "PyTorch sees no CUDA device",
            where="--device",
            fix="use --device auto, or run `rk-export doctor`",
        )
    return device

"""How little a block changes what passes through it: the score by which whole blocks go (2403.03853)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rk_export.calibration.cache_keys import key_on_text
from rk_export.calibration.text_run import TextRun
from rk_export.device import matmul_dtype
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cached

_TOGETHER = 2048  # tokens
_VERSION = 1  # raise when other numbers come out


def block_influence(
    source: Source,
    tokens: Tensor,
    device: torch.device,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> list[float]:
    """Return one minus the mean cosine between what each block reads and what it returns, over tokens.

    Args:
        source: A dense decoder.
        tokens: Text, int64 (sequences, length).
        device: Where it runs.
        cache_dir: Where what was computed is kept; ``~/.cache/rk-export`` when None.
    """
    runs = [device.type, str(matmul_dtype(device))]
    key = key_on_text(_VERSION, source, tokens, cache_dir, runs=runs)

    def make() -> dict[str, Tensor]:
        found = _influence(source, tokens, device)
        return {"influence": torch.tensor(found, dtype=torch.float64)}

    found: list[float] = cached("block-influence", key, make, cache_dir)["influence"].tolist()
    return found


def _influence(source: Source, tokens: Tensor, device: torch.device) -> list[float]:
    model = source.shared()
    blocks = list(model.get_submodule(source.architecture.layers).children())
    sums = [torch.zeros((), dtype=torch.float64) for _ in blocks]

    @contextmanager
    def watched(index: int) -> Iterator[None]:
        def note(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor | tuple[Tensor, ...]) -> None:
            states = output if isinstance(output, Tensor) else output[0]
            similar = nn.functional.cosine_similarity(arguments[0].float(), states.float(), dim=-1)
            sums[index] += (1 - similar.double()).sum().cpu()

        handle = blocks[index].register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()

    chunks = torch.split(tokens, max(1, _TOGETHER // tokens.shape[1]))
    run = TextRun(model, source.architecture, chunks, device=device)
    run.forward("influence of blocks, layers", watched)
    return [float(total) / tokens.numel() for total in sums]

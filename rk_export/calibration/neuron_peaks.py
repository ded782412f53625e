"""How large the inputs of FFN neurons' columns get: what evening them out goes by."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rk_export.calibration.cache_keys import key_on_text
from rk_export.calibration.moments import recorded_inputs
from rk_export.calibration.text_run import TextRun
from rk_export.device import matmul_dtype
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cached

# Peaks settle with little text.
SHORT_TEXT = 2048
_VERSION = 2  # raise when other numbers come out


def shortened(tokens: Tensor, count: int = SHORT_TEXT) -> Tensor:
    """Return the first sequences of a text, at most `count` tokens but at least one sequence."""
    return tokens[: max(1, count // tokens.shape[1])]


def neuron_peaks(
    source: Source,
    tokens: Tensor,
    device: torch.device,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Tensor]:
    """Return the largest absolute input of each FFN neuron's column: name of the down matrix -> (neurons,).

    Args:
        source: The dense model.
        tokens: A short text, int64 (sequences, length).
        device: Where it runs.
        cache_dir: Where what was computed is kept; ``~/.cache/rk-export`` when None.
    """
    key = key_on_text(_VERSION, source, tokens, cache_dir, runs=[device.type, str(matmul_dtype(device))])
    return dict(cached("neuron-peaks", key, lambda: _peaks(source, tokens, device), cache_dir))


def _peaks(source: Source, tokens: Tensor, device: torch.device) -> dict[str, Tensor]:
    model, peaks = source.shared(), dict[str, Tensor]()
    downs: defaultdict[int, dict[str, nn.Module]] = defaultdict(dict)
    for matrix in source.description.matrices:
        if matrix.role == "down" or (matrix.role == "expert" and matrix.id.path.endswith("down_proj")):
            downs[matrix.id.layer][matrix.id.name] = model.get_submodule(matrix.torch_path)

    @contextmanager
    def watched(index: int) -> Iterator[None]:
        with recorded_inputs(downs[index]) as inputs:
            yield
        peaks.update({name: x.flatten(0, -2).abs().amax(0).float().cpu() for name, x in inputs.items()})

    # All of the text is one chunk: every layer runs once.
    run = TextRun(model, source.architecture, [tokens], device=device)
    run.forward("peaks of FFN neurons, layers", watched)
    return peaks

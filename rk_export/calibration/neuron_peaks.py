"""How large the inputs of FFN neurons' columns get: what evening them out goes by."""

from __future__ import annotations

import torch
from torch import Tensor

from rk_export.calibration.moments import inputs_of
from rk_export.source.stored import ModelSource

# Peaks settle with little text.
SHORT_TEXT = 2048


def shortened(tokens: Tensor, count: int = SHORT_TEXT) -> Tensor:
    """Return the first sequences of a text, at most `count` tokens but at least one sequence."""
    return tokens[: max(1, count // tokens.shape[1])]


@torch.no_grad()
def neuron_peaks(source: ModelSource, tokens: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return the largest absolute input of each FFN neuron's column: name of the down matrix -> (neurons,)."""
    model, peaks = source.load().to(device), dict[str, Tensor]()
    names = [
        f"layers.{layer}.{item.path}"
        for layer in range(source.layer_count)
        for item in source.architecture.projections(source.config, layer)
        if item.role == "down" or (item.role == "expert" and item.path.endswith("down_proj"))
    ]
    root = source.architecture.layers.rpartition("layers")[0]
    modules = {name: model.get_submodule(root + name) for name in names}
    for ids in torch.split(tokens, max(1, SHORT_TEXT // tokens.shape[1])):
        with inputs_of(modules) as inputs:
            model(input_ids=ids.to(device), use_cache=False)
        for name, x in inputs.items():
            peak = x.flatten(0, -2).abs().amax(0).float().cpu()
            peaks[name] = torch.maximum(peaks.get(name, peak), peak)
    return peaks

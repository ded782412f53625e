"""What errors of the token embedding cost, where it is also the output projection and where it is not."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rk_export.calibration.cache_keys import key_on_text
from rk_export.calibration.moments import MomentSum
from rk_export.calibration.text_run import TextRun
from rk_export.device import matmul_dtype
from rk_export.passes.modules.quantized import RotatedHead
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.predicted_loss import TableCurvature
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cached

_VERSION = 3  # raise when other numbers come out: cached ones of an older version are then computed again


def table_curvature(
    source: Source,
    tokens: Tensor,
    device: torch.device,
    gradients: Tensor | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> TableCurvature:
    """Gather the curvature of the embedding and the output projection of a dense model, or read it.

    The Fisher information of the logits is diag(p) - p pᵀ; its diagonal p (1 - p) weighs the rows of the output
    projection. The embedding's rows are weighed by how often the text reads them.

    Args:
        source: The dense model.
        tokens: Calibration text, int64 (sequences, length), without padding.
        device: Where the passes run.
        gradients: Mean square of the loss' gradient by what the embedding writes (dim,), see `DenseStatistics`; without
            it errors of the embedding's rows count as nothing.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.

    """
    felt = torch.zeros(source.description.table_shape[1]) if gradients is None else gradients
    if source.architecture.lm_head is None:
        return _looked_up(source, tokens, felt)
    runs = [device.type, str(matmul_dtype(device))]
    key = key_on_text(_VERSION, source, tokens, cache_dir, runs=runs)

    def make() -> Mapping[str, Tensor]:
        return _gathered(source, tokens, device)

    known = cached("table-curvature", key, make, cache_dir)
    head = Curvature(Inputs(known["inputs"]), {"lm_head": known["outputs"]})
    lookup = Curvature(Inputs(known["frequencies"]), {"embedding": felt})
    return TableCurvature(head, lookup)


def _looked_up(source: Source, tokens: Tensor, felt: Tensor) -> TableCurvature:
    """Return the curvature of an encoder's embedding, which is no output projection."""
    rows, columns = source.description.table_shape
    frequencies = torch.bincount(tokens.flatten().cpu(), minlength=rows).double() / tokens.numel()
    head = Curvature(Inputs(torch.eye(columns)), {"lm_head": torch.zeros(rows)})
    return TableCurvature(head, Curvature(Inputs(frequencies), {"embedding": felt}))


def _gathered(source: Source, tokens: Tensor, device: torch.device) -> dict[str, Tensor]:
    model, path = source.shared(), source.architecture.lm_head
    if path is None:
        raise ValueError("an encoder has no output projection")
    head = model.get_submodule(path)
    recorder = _Recorder(tokens, source.config.vocab_size)
    inner = head.head if isinstance(head, RotatedHead) else head
    run = TextRun(model, source.architecture, [tokens], device=device)
    run.forward("statistics of the embedding, layers")
    handle = inner.register_forward_pre_hook(recorder.reads)
    try:
        for logits in run.logits():
            recorder.see(logits)
    finally:
        handle.remove()
    return recorder.means()


class _Recorder:
    """Sums over the tokens of a text.

    Args:
        tokens: The text, int64 (sequences, length).
        vocabulary: Rows of the embedding.
    """

    def __init__(self, tokens: Tensor, vocabulary: int) -> None:
        self._inputs = MomentSum()
        self._outputs = torch.zeros(vocabulary, dtype=torch.float64)
        self._counts = torch.bincount(tokens.flatten().cpu(), minlength=vocabulary).double()

    def reads(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Note what the output projection reads."""
        self._inputs.add(arguments[0])

    def see(self, logits: Tensor) -> None:
        """Note the probabilities of some tokens, given their logits (tokens, vocabulary)."""
        probabilities = logits.softmax(-1)
        self._outputs += (probabilities - probabilities.square()).sum(0).double().cpu()

    def means(self) -> dict[str, Tensor]:
        """Return the means over tokens, as they are cached."""
        tokens = float(self._counts.sum())
        inputs = self._inputs.mean()
        return {
            "outputs": self._outputs / tokens,
            "inputs": inputs,
            "frequencies": self._counts / tokens,
        }

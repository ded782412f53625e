"""What errors of the token embedding cost, where it is also the output projection and where it is not."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.calibration.cache_keys import key_on_text
from rk_export.calibration.moments import MomentSum
from rk_export.device import matmul_dtype, matmuls_in
from rk_export.errors import InputError
from rk_export.model.families import Architecture
from rk_export.passes.modules.quantized import RotatedHead
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.passes.numerics.predicted_loss import TableCurvature
from rk_export.progress import track
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cached

CHUNK = 512  # tokens of one pass
_VERSION = 2  # raise when other numbers come out: cached ones of an older version are then computed again


def table_curvature(
    source: Source,
    tokens: Tensor,
    device: torch.device,
    gradients: Tensor | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> TableCurvature:
    """Gather the curvature of the embedding and the output projection of a dense decoder, or read it.

    The Fisher information of the logits is diag(p) - p pᵀ; its diagonal p (1 - p) weighs the rows of the output
    projection. The embedding's rows are weighed by how often the text reads them.

    Args:
        source: The dense model.
        tokens: Calibration text, int64 (sequences, length), without padding.
        device: Where the passes run.
        gradients: Mean square of the loss' gradient by what the embedding writes (dim,), see `DenseStatistics`; without
            it errors of the embedding's rows count as nothing.
        cache_dir: The cache; ``~/.cache/rk-export`` when None.

    Raises:
        InputError: If the model is an encoder.
    """
    if source.architecture.lm_head is None:
        raise InputError("an encoder has no output projection", where=source.architecture.model_type)
    runs = [device.type, str(matmul_dtype(device))]
    key = key_on_text(_VERSION, source, tokens, cache_dir, runs=runs)

    def make() -> Mapping[str, Tensor]:
        return _gathered(source.shared(), source.architecture, tokens, device)

    known = cached("table-curvature", key, make, cache_dir)
    head = Curvature(Inputs(known["inputs"]), {"lm_head": known["outputs"]})
    felt = torch.zeros(source.config.hidden_size) if gradients is None else gradients
    lookup = Curvature(Inputs(known["frequencies"]), {"embedding": felt})
    return TableCurvature(head, lookup)


@torch.no_grad()
def _gathered(
    model: PreTrainedModel, architecture: Architecture, tokens: Tensor, device: torch.device
) -> dict[str, Tensor]:
    if architecture.lm_head is None:
        raise ValueError("an encoder has no output projection")
    model.requires_grad_(False).to(device)
    head = model.get_submodule(architecture.lm_head)
    recorder = _Recorder(model.config.vocab_size)
    inner = head.head if isinstance(head, RotatedHead) else head
    handle = inner.register_forward_pre_hook(recorder.reads)
    try:
        chunks = torch.split(tokens, max(1, CHUNK // tokens.shape[1]))
        for ids in track(chunks, "statistics of the embedding, chunks of text"):
            with matmuls_in(matmul_dtype(device), device):
                logits = model(input_ids=ids.to(device), use_cache=False).logits.float().flatten(0, 1)
            recorder.see(ids, logits)
    finally:
        handle.remove()
    return recorder.means()


class _Recorder:
    """Sums over the tokens of a text."""

    def __init__(self, vocabulary: int) -> None:
        self._inputs = MomentSum()
        self._outputs = torch.zeros(vocabulary, dtype=torch.float64)
        self._counts = torch.zeros(vocabulary, dtype=torch.float64)

    def reads(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """Note what the output projection reads."""
        self._inputs.add(arguments[0])

    def see(self, ids: Tensor, logits: Tensor) -> None:
        """Note the tokens and the probabilities behind them."""
        probabilities = logits.softmax(-1)
        self._outputs += (probabilities * (1 - probabilities)).sum(0).double().cpu()
        self._counts += torch.bincount(ids.flatten().cpu(), minlength=len(self._counts))

    def means(self) -> dict[str, Tensor]:
        """Return the means over tokens, as they are cached."""
        tokens = float(self._counts.sum())
        inputs = self._inputs.mean()
        if inputs is None:
            raise ValueError("no tokens were seen")
        return {
            "outputs": self._outputs / tokens,
            "inputs": inputs,
            "frequencies": self._counts / tokens,
        }

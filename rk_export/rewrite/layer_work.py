"""Finishing single layers in other processes: what they are given, and what they do with it."""

from __future__ import annotations

import functools
import io
import logging
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from logging import LogRecord
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from rk_export.atomic import atomic_file
from rk_export.calibration.layer_statistics import LayerStatistics
from rk_export.matrix_id import MatrixId
from rk_export.passes.base import Layer
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.plan import Plan
from rk_export.rewrite.apply import finished_layer
from rk_export.rewrite.layer_store import LayerStore
from rk_export.source.protocol import Source
from rk_export.tensor_cache import place_of

_HANDED = "handed.safetensors"
_OURS = "rk_export"


@dataclass(frozen=True)
class LayerWork:
    """What it takes to finish any layer of a model, whatever became of the others.

    Args:
        source: The dense model.
        plan: What to do.
        statistics: Stationary ones: those of a layer do not depend on the layers before.
        parts: Of the matrices in the sparse form.
        store: Takes the finished layers.
        device: Where matrices are factorized and quantized.
    """

    source: Source
    plan: Plan
    statistics: LayerStatistics
    parts: Mapping[MatrixId, Parts]
    store: LayerStore
    device: torch.device

    @property
    def missing(self) -> list[int]:
        """The layers that nobody finished yet."""
        return [index for index in range(self.source.layer_count) if index not in self.store]

    def finish(self, index: int) -> None:
        """Load a layer, finish it and keep it."""
        module = self.source.load_layer(self._model, index)
        layer = Layer(index, module, self.source.description.heads.kv_heads)
        known = self.statistics.of_sites(layer, self.plan.of_layer(index))
        self.store.keep(index, finished_layer(self.source, self.plan, layer, known, self.parts, self.device))
        module.to("meta")

    @cached_property
    def _model(self) -> PreTrainedModel:
        return self.source.skeleton()

    def packed(self, folder: Path) -> bytes:
        """Return this for other processes, to be unpacked by `unpacked`: tensors travel as names in files.

        Args:
            folder: Takes the tensors that lie in no file that has a name; the processes must see it.

        Raises:
            OSError: The disk is full, or nothing can be written there.
        """
        stream = io.BytesIO()
        pickler = _ByPlace(stream, folder / _HANDED)
        pickler.dump(self)
        if pickler.handed:
            with atomic_file(folder / _HANDED) as partial:
                save_file(pickler.handed, partial)
        return stream.getvalue()


def forget_handed(folder: Path) -> None:
    """Remove the tensors that `packed` wrote into a folder: nobody reads them any more."""
    (folder / _HANDED).unlink(missing_ok=True)


def unpacked(work: bytes) -> LayerWork:
    """Return what `packed` made in the process that asks for the work."""
    made = pickle.loads(work)  # noqa: S301 (it comes from the process that started this one, not from a file)
    if not isinstance(made, LayerWork):
        raise TypeError(f"{type(made).__name__} is no work on layers")
    return made


def collect_logs() -> None:
    """Keep what this process notes about its layers for `log_of`, instead of showing it here."""
    ours = logging.getLogger(_OURS)
    ours.addHandler(logging.NullHandler())
    ours.propagate = False
    ours.setLevel(logging.INFO)


def log_of(work: LayerWork, index: int) -> list[LogRecord]:
    """Finish a layer, and return what was logged meanwhile, for the log of the process that asked."""
    told: SimpleQueue[LogRecord] = SimpleQueue()
    ours, handler = logging.getLogger(_OURS), QueueHandler(told)
    ours.addHandler(handler)
    try:
        work.finish(index)
    finally:
        ours.removeHandler(handler)
    return [told.get() for _ in range(told.qsize())]


def say(records: list[LogRecord]) -> None:
    """Log what another process noted."""
    for record in records:
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)


class _ByPlace(pickle.Pickler):
    """Writes tensors as a file and a name in it.

    Args:
        stream: Takes the rest.
        path: The file of the tensors that lie in none; `handed` are those, for the caller to write.
    """

    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path
        self.handed: dict[str, Tensor] = {}

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not Tensor:
            return NotImplemented
        place = place_of(value)
        if place is None:
            place = self._path, str(len(self.handed))
            self.handed[place[1]] = _alone(value)
        return _tensor_at, (place[0].resolve(), place[1])


def _alone(tensor: Tensor) -> Tensor:
    """Return a tensor whose memory is that of no other one: a file of safetensors takes no views."""
    own = tensor.detach().cpu().contiguous()
    return own if own.untyped_storage().nbytes() == own.nbytes and own is not tensor else own.clone()


def _tensor_at(path: Path, name: str) -> Tensor:
    return _tensors_of(path)[name]


@functools.cache
def _tensors_of(path: Path) -> Mapping[str, Tensor]:
    """Return the tensors of a file, mapped; once, since many are asked for."""
    found: dict[str, Tensor] = load_file(path)
    return found

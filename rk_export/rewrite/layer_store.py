"""Finished layers and tables on disk: what a run that was interrupted goes on from, and what workers hand over."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rk_export.atomic import atomic_file
from rk_export.errors import InputError
from rk_export.json_codec import from_json, load_json, to_json
from rk_export.manifest import sha256_of
from rk_export.report.records import Finding, Spectrum

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FinishedLayer:
    """A layer, or the tables outside the layers, as a plan leaves it.

    Args:
        tensors: Parameters and buffers by name.
        unrounded: The same before its matrices were rounded; empty where nothing but rounding is done to it.
        findings: What happened to its sites.
        spectra: Of its matrices that were factorized.
    """

    tensors: Mapping[str, Tensor]
    unrounded: Mapping[str, Tensor] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    spectra: tuple[Spectrum, ...] = ()


@dataclass(frozen=True)
class _Record:
    """What lies beside the tensors of a layer; a layer without one is not finished.

    Args:
        sha256: Of the file of tensors.
        unchanged: Tensors that rounding leaves as they are: they are stored once.
        findings: As in `FinishedLayer`.
        spectra: As in `FinishedLayer`.
    """

    sha256: str
    unchanged: tuple[str, ...]
    findings: tuple[Finding, ...]
    spectra: tuple[Spectrum, ...]


_ROUNDED, _UNROUNDED = "rounded/", "unrounded/"
TABLES = -1  # stands among the layers for the embedding and the output projection


class LayerStore:
    """The finished layers of one run.

    Args:
        folder: Where they lie; it is made when the first one is kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __contains__(self, index: int) -> bool:
        """Whether a layer was finished; that its file is sound only `find` tells."""
        return self._record(index).is_file()

    def keep(self, index: int, layer: FinishedLayer) -> None:
        """Write a layer, its tensors first: a record stands for tensors that are complete."""
        unchanged = tuple(
            name for name, tensor in layer.unrounded.items() if _same(layer.tensors.get(name), tensor)
        )
        tensors = {f"{_ROUNDED}{name}": tensor for name, tensor in layer.tensors.items()}
        tensors |= {
            f"{_UNROUNDED}{name}": tensor for name, tensor in layer.unrounded.items() if name not in unchanged
        }
        with atomic_file(self._tensors(index)) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial)
        record = _Record(sha256_of(self._tensors(index)), unchanged, layer.findings, layer.spectra)
        with atomic_file(self._record(index)) as partial:
            partial.write_text(json.dumps(to_json(record)), encoding="utf-8")

    def find(self, index: int) -> FinishedLayer | None:
        """Return a finished layer, its tensors mapped; None where there is none, or a damaged one, which is logged."""
        if index not in self:
            return None
        try:
            path = self._record(index)
            record = from_json(_Record, load_json(path, fix="delete it"), str(path))
            if sha256_of(self._tensors(index)) != record.sha256:
                raise ValueError("its checksum differs from the one that was noted")
            stored = load_file(self._tensors(index))
        except (OSError, ValueError, InputError) as error:
            logger.warning("%s is made again: %s is damaged: %s", _name(index), self._tensors(index), error)
            return None
        rounded, unrounded = _below(stored, _ROUNDED), _below(stored, _UNROUNDED)
        unrounded |= {name: rounded[name] for name in record.unchanged}
        return FinishedLayer(rounded, unrounded, record.findings, record.spectra)

    def _tensors(self, index: int) -> Path:
        return self._folder / f"{_name(index)}.safetensors"

    def _record(self, index: int) -> Path:
        return self._folder / f"{_name(index)}.json"


def filled(layer: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """Return an empty layer with its tensors, which are taken as they are, not copied.

    Raises:
        RuntimeError: If tensors are missing, left over or of other shapes.
    """
    layer.load_state_dict(dict(tensors), assign=True)
    return layer.requires_grad_(False)


def _name(index: int) -> str:
    return "tables" if index == TABLES else f"layer-{index:05}"


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.data_ptr() == other.data_ptr() and one.shape == other.shape


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

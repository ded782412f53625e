"""What a dense model is to every later stage: a description, and layers that are filled one at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from rk_export.memory import give_back
from rk_export.model.architecture import Architecture
from rk_export.model.description import ModelDescription
from rk_export.passes.base import Layer
from rk_export.passes.numerics.grid import Grid
from rk_export.plan import Pruning
from rk_export.progress import track
from rk_export.report.records import Finding
from rk_export.scratch import settle


class Source(Protocol):
    """A dense model whose tensors are read when they are asked for."""

    @property
    def name(self) -> str:
        """What the user called the model."""

    @property
    def title(self) -> str:
        """The name for reports: it does not say where the model lies on this machine."""

    @property
    def folder(self) -> Path:
        """Where the tokenizer lies: with the weights, or with an adapter that brings another one."""

    @property
    def description(self) -> ModelDescription:
        """What the model is."""

    @property
    def config(self) -> PretrainedConfig:
        """The description's config."""

    @property
    def architecture(self) -> Architecture:
        """The description's family."""

    @property
    def layer_count(self) -> int:
        """Number of decoder (or encoder) layers."""

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was done to the model on the way from its files."""

    @property
    def notices(self) -> tuple[str, ...]:
        """What a reader of config.json alone would not expect."""

    @property
    def pruning(self) -> Pruning | None:
        """What is left of the model's whole structures; None where all are."""

    @property
    def changed(self) -> str:
        """How its tensors differ from what transformers reads from the folder; empty where they do not."""

    @property
    def origin(self) -> tuple[Path, Path | None]:
        """What `open_source` opens the files by: a folder, and the base model's folder where it is an adapter."""

    @property
    def places(self) -> tuple[Path, ...]:
        """Files and folders that the model is read from; no output may replace them."""

    @property
    def has_grids(self) -> bool:
        """Whether any matrix is stored on an integer grid."""

    def grid(self, name: str) -> Grid | None:
        """Return the stored codes (out, in) of a matrix, by its name in the model; None where there are none."""

    def structure(self) -> str:
        """Return a fingerprint of the names and shapes in the checkpoint; plans carry it."""

    def parameter_count(self) -> int:
        """Return the parameters of the dense model as it is stored, tied weights once."""

    def stored_bytes(self) -> int:
        """Return the bytes of the checkpoint's files."""

    def fingerprint(self, cache_dir: str | os.PathLike[str] | None = None) -> str:
        """Return the SHA-256 of the files that decide what the tensors are, and of what is done to them.

        Args:
            cache_dir: Where digests of files are kept; ``~/.cache/rk-export`` when None.
        """

    def tensor(self, key: str) -> Tensor:
        """Read one tensor of the checkpoint as float32, by its name in the files."""

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights (parameters on meta, buffers real), to be filled layer by layer."""

    def load_layer(self, model: PreTrainedModel, index: int) -> nn.Module:
        """Fill one layer of a skeleton in float32, bring it into canonical form and return it."""

    def load_rest(self, model: PreTrainedModel) -> None:
        """Fill everything outside the layers: embeddings, final norm, lm_head."""

    def load(self) -> PreTrainedModel:
        """Return the whole model in canonical form, float32: the caller's own; large tensors lie on disk, mapped."""

    def shared(self) -> PreTrainedModel:
        """Return the whole model like `load`, for a look: it may be kept for others and must not be changed."""

    def layers(self) -> Iterator[Layer]:
        """Yield the layers with their weights, for a look, one at a time in memory."""


class Loading:
    """What follows from the description and from reading layers one at a time."""

    @property
    def config(self: Source) -> PretrainedConfig:
        """The description's config."""
        return self.description.config

    @property
    def architecture(self: Source) -> Architecture:
        """The description's family."""
        return self.description.architecture

    @property
    def layer_count(self: Source) -> int:
        """Number of decoder (or encoder) layers."""
        return self.description.layer_count

    def load(self: Source) -> PreTrainedModel:
        """Return the whole model in canonical form, float32: the caller's own; large tensors lie on disk, mapped."""
        return load_mapped(self, untouched=True)

    def shared(self: Source) -> PreTrainedModel:
        """Return the whole model like `load`, for a look: it may be kept for others and must not be changed."""
        return self.load()

    def layers(self: Source) -> Iterator[Layer]:
        """Yield the layers with their weights, for a look, one at a time in memory."""
        model = self.skeleton()
        for index in range(self.layer_count):
            module = self.load_layer(model, index)
            yield Layer(index, module, self.description.heads.kv_heads)
            module.to("meta")


def load_mapped(source: Source, *, untouched: bool, folder: Path | None = None) -> PreTrainedModel:
    """Return a whole model, read a layer at a time: what does not lie in a file as it is moves to the disk.

    Args:
        source: The model.
        untouched: Nothing is changed in a tensor after it was read.
        folder: As in `rk_export.scratch.mapped`.
    """
    model = source.skeleton()
    source.load_rest(model)
    for path in source.description.outer_paths:
        settle(model.get_submodule(path), folder, untouched=untouched)
    for index in track(range(source.layer_count), "reading layers"):
        settle(source.load_layer(model, index), folder, untouched=untouched)
        give_back()
    return model

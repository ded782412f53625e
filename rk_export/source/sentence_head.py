"""The modules that follow a model's hidden states, with their weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.inside import copy_inside, file_inside
from rk_export.model.sentence_modules import (
    WEIGHTS,
    Dense,
    Norm,
    SentenceModules,
    module_folders,
    read_sentence_modules,
)
from rk_export.runtime.sentence_files import MODULES_FILE, SETTINGS_FILE, TRANSFORMER_FILES, SentenceFiles
from rk_export.source.tensor_files import SafetensorFiles


@dataclass(frozen=True)
class SentenceHead:
    """What makes one vector of hidden states.

    Args:
        modules: What is computed.
        weights: Float32, by the module's folder and the name in its file, joined by a dot: ``2_Dense.linear.weight``.
    """

    modules: SentenceModules
    weights: Mapping[str, Tensor] = field(default_factory=dict)


def read_sentence_head(folder: Path, config: PretrainedConfig) -> SentenceHead | None:
    """Return the modules of a model folder with their weights, or None where it has no ``modules.json``.

    Raises:
        UnsupportedModelError: The graph cannot repeat a module.
        InputError: A file is malformed, or a tensor is missing or has another shape.
    """
    modules = read_sentence_modules(folder, config)
    if modules is None:
        return None
    SentenceFiles.read(folder)  # malformed settings and prompts would only be found when a text is encoded
    weights: dict[str, Tensor] = {}
    for step in modules.steps:
        if isinstance(step, Dense | Norm):
            weights |= _weights(folder, step)
    return SentenceHead(modules, weights)


def copy_sentence_files(source: Path, folder: Path) -> None:
    """Copy the files of sentence-transformers beside a model, where there are any: modules, settings and prompts.

    Raises:
        InputError: ``modules.json`` is malformed, or a file is a link that leads out of the folder.
    """
    for name in (MODULES_FILE, SETTINGS_FILE, *TRANSFORMER_FILES):
        if (source / name).is_file():
            copy_inside(source, name, folder)
    path = source / MODULES_FILE
    for place in module_folders(path) if path.is_file() else ():
        for name in ("config.json", WEIGHTS):
            if (source / place / name).is_file():
                copy_inside(source, f"{place}/{name}", folder)


def _weights(folder: Path, step: Dense | Norm) -> dict[str, Tensor]:
    where = str(folder / step.folder / WEIGHTS)
    path = file_inside(folder, f"{step.folder}/{WEIGHTS}", where=where)
    files = SafetensorFiles([path])
    found = {}
    for name, shape in _shapes(step):
        if tuple(files.shapes.get(name, ())) != shape:
            raise InputError(
                f"tensor {name!r} must have the shape {list(shape)}, as the module's config.json says",
                where=where,
                fix="use the folder as it was published",
            )
        found[f"{step.folder}.{name}"] = files.read(name).float()
    return found


def _shapes(step: Dense | Norm) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a module by name and shape."""
    if isinstance(step, Norm):
        yield "norm.weight", (step.size,)
        yield "norm.bias", (step.size,)
        return
    width, out = step.sizes
    yield "linear.weight", (out, width)
    if step.bias:
        yield "linear.bias", (out,)
    if step.residual and width != out:
        yield "residual.weight", (out, width)

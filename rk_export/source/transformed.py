"""A stored model under a list of changes, each made layer by layer as the layer is loaded."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export.model.description import ModelDescription
from rk_export.model.torch_models import stored_buffers
from rk_export.passes.base import Layer
from rk_export.passes.numerics.grid import Grid
from rk_export.plan import Pruning
from rk_export.report.records import Finding
from rk_export.source.memory import Memory
from rk_export.source.protocol import Loading, Source, load_mapped
from rk_export.tensor_cache import name_model


class Transform:
    """One change of a dense model; authors override what differs.

    Attributes:
        variant: Tells changes apart that give other tensors; empty where nothing is changed.
        pruning: What is left of whole structures; None where all are.
    """

    variant: str = ""
    pruning: Pruning | None = None

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What was done, and what was not and why."""
        return ()

    def check(self, earlier: tuple[Transform, ...]) -> None:
        """Refuse to follow other changes.

        Raises:
            InputError: Says which.
        """

    def description(self, before: ModelDescription) -> ModelDescription:
        """Return what the model is afterwards."""
        return before

    def block(self, index: int) -> int:
        """Return the layer of the model before that a layer is made from."""
        return index

    def layer(self, layer: nn.Module, index: int) -> nn.Module:
        """Change a canonical layer in place, or return another one.

        Args:
            layer: As the changes before leave it.
            index: Its number afterwards.
        """
        return layer

    def rest(self, model: PreTrainedModel) -> None:
        """Change what is outside the layers, in place."""


class Transformed(Loading):
    """A stored model as a list of changes leaves it; folder, structure and sizes are those of the stored one.

    Args:
        stored: The model as it was opened.
        transforms: The changes, in their order.
        memory: What passes over the model share; None keeps nothing between them.

    Raises:
        InputError: If a change cannot follow those before it.
    """

    def __init__(
        self, stored: Source, transforms: tuple[Transform, ...] = (), memory: Memory | None = None
    ) -> None:
        self.stored, self.transforms, self._memory = stored, transforms, memory
        self.description = stored.description
        for number, transform in enumerate(transforms):
            transform.check(transforms[:number])
            self.description = transform.description(self.description)
        self._done: WeakSet[nn.Module] = WeakSet()
        self._whole: WeakKeyDictionary[PreTrainedModel, PreTrainedModel] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[type[Transformed], tuple[Source, tuple[Transform, ...]]]:
        """Travel between processes without what is in memory: there the layers are made from the files again."""
        return Transformed, (self.stored, self.transforms)

    def then(self, transform: Transform) -> Transformed:
        """Return the model under one more change."""
        return Transformed(self.stored, (*self.transforms, transform), self._memory)

    @property
    def name(self) -> str:
        return self.stored.name

    @property
    def title(self) -> str:
        return self.stored.title

    @property
    def folder(self) -> Path:
        return self.stored.folder

    @property
    def notices(self) -> tuple[str, ...]:
        return self.stored.notices

    @property
    def changed(self) -> str:
        return self.stored.changed

    @property
    def origin(self) -> tuple[Path, Path | None]:
        return self.stored.origin

    @property
    def places(self) -> tuple[Path, ...]:
        return self.stored.places

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the stored model and each change say."""
        return (
            *self.stored.findings,
            *(item for transform in self.transforms for item in transform.findings),
        )

    @property
    def pruning(self) -> Pruning | None:
        """What the last change that left out whole structures kept."""
        return next((item.pruning for item in reversed(self.transforms) if item.pruning), self.stored.pruning)

    @property
    def has_grids(self) -> bool:
        """Whether any matrix is on an integer grid: changes move the values off it."""
        return self.stored.has_grids and not self.transforms

    def grid(self, name: str) -> Grid | None:
        """Return the stored codes of a matrix; None where there are none, or the values were changed."""
        return None if self.transforms else self.stored.grid(name)

    def structure(self) -> str:
        return self.stored.structure()

    def parameter_count(self) -> int:
        return self.stored.parameter_count()

    def stored_bytes(self) -> int:
        return self.stored.stored_bytes()

    def tensor(self, key: str) -> Tensor:
        return self.stored.tensor(key)

    def fingerprint(self, cache_dir: str | os.PathLike[str] | None = None) -> str:
        """Return the SHA-256 of the stored model's fingerprint and of the changes."""
        files = self.stored.fingerprint(cache_dir)
        variants = [item.variant for item in self.transforms if item.variant]
        if not variants:
            return files
        digest = hashlib.sha256(json.dumps([files, *variants]).encode()).hexdigest()
        name_model(digest, self.title)
        return digest

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights (parameters on meta, buffers real), to be filled layer by layer."""
        return self.description.skeleton()

    def load_layer(self, model: PreTrainedModel, index: int) -> nn.Module:
        """Fill one layer of a skeleton in float32, in canonical form and changed, and return it.

        A layer that is filled already stays as it is.
        """
        layer: nn.Module = model.get_submodule(f"{self.architecture.layers}.{index}")
        if not self._is_fresh(layer):
            return layer
        blocks = self._blocks(index)
        held = self._held()
        first = 0 if held is None else len(held.transforms)
        made = None if held is None else held.take_layer(blocks[first])
        if made is None:
            made, first = self._from_files(model, blocks[0]), 0
        for transform, number in zip(self.transforms[first:], blocks[first + 1 :], strict=True):
            made = transform.layer(made, number)
        if made is not layer:
            self.architecture.canonicalize(layer)
            _move(made, layer)
        return layer

    def load_rest(self, model: PreTrainedModel) -> None:
        """Fill embeddings, final norm and lm_head, changed; what is filled already stays as it is."""
        path = next(iter(self.architecture.outer))
        if not self._is_fresh(model.get_submodule(path)):
            return
        held = self._held()
        left = self.transforms if held is None else self.transforms[len(held.transforms) :]
        if held is None or not held.fill_rest(model, for_good=bool(left)):
            self.stored.load_rest(model)
            left = self.transforms
        for transform in left:
            transform.rest(model)
        self._done.add(model.get_submodule(path))

    def shared(self) -> PreTrainedModel:
        """Return the whole model, the one that is in memory already where there is one."""
        if self._memory is None or not self._memory.is_open:
            return self.load()
        if (model := self._memory.whole(self.transforms)) is None:
            model = self.load()
            self._memory.hold(model, self.description, self.transforms)
        return model

    def load(self) -> PreTrainedModel:
        """Return the whole model in canonical form, float32: the caller's own; large tensors lie on disk, mapped."""
        folder = None if self._memory is None else self._memory.folder
        return load_mapped(self, untouched=not self.transforms, folder=folder)

    def layers(self) -> Iterator[Layer]:
        """Yield the layers with their weights: one at a time from the files, or all from memory where one is kept."""
        if self._memory is None or not self._memory.is_open:
            yield from super().layers()
            return
        model = self.shared()
        for index, module in enumerate(model.get_submodule(self.architecture.layers).children()):
            yield Layer(index, module.to("cpu"), self.description.heads.kv_heads)

    def forget(self) -> None:
        """Keep nothing in memory from now on."""
        if self._memory is not None:
            self._memory.close()

    def _held(self) -> Memory | None:
        """Return the memory where it holds this model, or it as some of the changes leave it."""
        memory = self._memory
        return memory if memory is not None and memory.is_before(self.transforms) else None

    def _blocks(self, index: int) -> list[int]:
        """Return the number of a layer before the first change, after it, after the second ..."""
        blocks = [index]
        for transform in reversed(self.transforms):
            blocks.append(transform.block(blocks[-1]))
        return blocks[::-1]

    def _from_files(self, model: PreTrainedModel, block: int) -> nn.Module:
        """Return a layer of the stored model: of the skeleton itself, or of a whole one where shapes differ."""
        if self.description is self.stored.description:
            return self.stored.load_layer(model, block)
        if model not in self._whole:
            self._whole[model] = self.stored.skeleton()
        blocks = cast(nn.ModuleList, self._whole[model].get_submodule(self.architecture.layers))
        empty = copy.deepcopy(blocks[block])
        whole = self.stored.load_layer(self._whole[model], block)
        blocks[block] = empty
        return whole

    def _is_fresh(self, module: nn.Module) -> bool:
        """Whether this is the first time; what was changed in a layer since then stays as it is."""
        fresh = module not in self._done or any(item.is_meta for item in module.parameters())
        self._done.add(module)
        return fresh


def _move(made: nn.Module, layer: nn.Module) -> None:
    """Give the parameters and stored buffers of one layer to another of the same form."""
    for name, parameter in made.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(layer.get_submodule(owner), leaf, nn.Parameter(parameter.data, requires_grad=False))
    for name, buffer in stored_buffers(made):
        layer.get_buffer(name).data = buffer.data

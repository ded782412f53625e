"""A model that several passes look at, on disk where it need not stay in memory; the last one takes it apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from torch import nn
from transformers import PreTrainedModel

from rk_export.model.description import ModelDescription


@dataclass(frozen=True)
class _Held:
    """A whole model, its description, what was done to it, and the layers that were taken away."""

    model: PreTrainedModel
    description: ModelDescription
    transforms: tuple[object, ...]
    taken: set[int]


_REST = -1  # among what was taken: embedding, final norm and head


class Memory:
    """At most one model: the dense one after some of a source's changes.

    Who takes a layer owns it: it is given once, so that what a pass makes of it does not stand beside it. When the
    last one is gone the model is too.

    Args:
        folder: Whose disk holds what need not stay in memory; the cache's when None.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._held: _Held | None = None
        self.is_open = True

    def close(self) -> None:
        """Let go of the model, and keep none from now on."""
        self._held, self.is_open = None, False

    @property
    def transforms(self) -> tuple[object, ...]:
        """The changes that the model has seen."""
        return () if self._held is None else self._held.transforms

    def hold(
        self, model: PreTrainedModel, description: ModelDescription, transforms: Sequence[object]
    ) -> None:
        """Keep a whole model in place of what is there."""
        self._held = _Held(model, description, tuple(transforms), set())

    def whole(self, transforms: Sequence[object]) -> PreTrainedModel | None:
        """Return the model under exactly these changes, None where it is not here or no longer whole."""
        held = self._held
        if held is None or held.transforms != tuple(transforms) or held.taken:
            return None
        return held.model

    def is_before(self, transforms: Sequence[object]) -> bool:
        """Whether these changes begin with those that the model has seen."""
        held = self._held
        return held is not None and tuple(transforms)[: len(held.transforms)] == held.transforms

    def take_layer(self, index: int) -> nn.Module | None:
        """Return a layer on the CPU, for the caller to keep; None where it was taken before."""
        held = self._held
        if held is None or index in held.taken:
            return None
        held.taken.add(index)
        layers = cast(nn.ModuleList, held.model.get_submodule(held.description.architecture.layers))
        layer, layers[index] = layers[index].to("cpu"), nn.Identity()
        if len(held.taken - {_REST}) == held.description.layer_count:
            self._held = None
        return layer

    def fill_rest(self, model: PreTrainedModel, *, for_good: bool) -> bool:
        """Put embedding, final norm and head into a skeleton, on the CPU; return whether they were here.

        Args:
            model: The skeleton.
            for_good: The caller will change them: they count as taken.
        """
        held = self._held
        if held is None or _REST in held.taken:
            return False
        for path in held.description.outer_paths:
            model.set_submodule(path, held.model.get_submodule(path).to("cpu"))
        if for_good:
            held.taken.add(_REST)
        return True

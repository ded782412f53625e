"""Tensors of a checkpoint under other names: without what wrappers and larger models put before a model's own."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from rk_export.errors import InputError
from rk_export.source.tensor_files import StoredTensors

# What torch.compile, FSDP, activation checkpointing and PEFT put between the names of modules.
WRAPPERS = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer", "modules_to_save"}
)


class RenamedTensors:
    """Tensors of another set under new names; those without a new name are left out.

    Args:
        tensors: The tensors as they are stored.
        stored: Stored name by new name.
    """

    def __init__(self, tensors: StoredTensors, stored: Mapping[str, str]) -> None:
        self._tensors, self._stored = tensors, dict(stored)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        shapes = self._tensors.shapes
        return {name: shapes[stored] for name, stored in self._stored.items()}

    @property
    def files(self) -> frozenset[Path]:
        return self._tensors.files

    def place(self, name: str) -> str:
        return self._tensors.place(self._stored[name])

    def read(self, name: str) -> Tensor:
        return self._tensors.read(self._stored[name])


def renamed(tensors: StoredTensors, names: Mapping[str, str]) -> StoredTensors:
    """Return tensors under new names.

    Args:
        tensors: The tensors as they are stored.
        names: New name by stored name.

    Raises:
        InputError: If two would get the same name.
    """
    stored: dict[str, str] = {}
    for old, new in names.items():
        if new in stored:
            raise InputError(
                f"{stored[new]!r} and {old!r} are both the tensor {new!r}",
                where=tensors.place(old),
                fix="leave one of them in the checkpoint",
            )
        stored[new] = old
    return RenamedTensors(tensors, stored)


def without_wrappers(name: str) -> str:
    """Return a name without the parts that wrappers of modules put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def unwrapped(
    tensors: StoredTensors, layers: str, base: str, modules: Collection[str]
) -> tuple[StoredTensors, str]:
    """Return a checkpoint's tensors without wrappers and without a prefix that is not the model's own.

    Where the model begins is found by its first layer: `language_model.model.layers.0.mlp.up_proj.weight` says that
    `language_model.` goes. Quantized checkpoints are found too: modules are compared, not tensors.

    Args:
        tensors: The tensors as they are stored.
        layers: Torch path of the list of layers, such as `model.layers`.
        base: Prefix of the model's own base model, such as `model`; checkpoints may have it or not.
        modules: Paths of the modules of the first layer that hold parameters, relative to the layer.

    Returns:
        The tensors, and the prefix that went; empty for none.

    Raises:
        InputError: If two tensors get the same name, or the checkpoint holds two models of this kind.
    """
    names = {name: without_wrappers(name) for name in tensors.shapes}
    prefix = _prefix(names.values(), layers, base, modules)
    names = {old: new.removeprefix(prefix) for old, new in names.items()}
    if all(old == new for old, new in names.items()):
        return tensors, ""
    went = prefix or ", ".join(
        sorted({f"{part}." for old in names for part in old.split(".") if part in WRAPPERS})
    )
    return renamed(tensors, names), went


def _prefix(names: Iterable[str], layers: str, base: str, modules: Collection[str]) -> str:
    """Return what stands before the model's names: the prefix under which most modules of its first layer are."""
    owners = {name.rpartition(".")[0] for name in names}
    own = f"{base}."
    found: dict[str, int] = {}
    for path in dict.fromkeys((layers, layers.removeprefix(own))):
        first = re.compile(rf"(?P<prefix>(?:.+\.)?){re.escape(path)}\.0\.")
        for prefix in {match["prefix"] for owner in owners if (match := first.match(f"{owner}."))}:
            if path != layers and f".{prefix}".endswith(f".{own}"):
                continue  # the whole path is there
            count = sum(f"{prefix}{path}.0.{module}" in owners for module in modules)
            if count:
                found[prefix] = max(count, found.get(prefix, 0))
    best = sorted(prefix for prefix, count in found.items() if count == max(found.values()))
    # BERT's own names lack the prefix of its base model; where names have it, it is no stranger's.
    if not best or {"", "" if layers.startswith(own) else own} & set(best):
        return ""
    if len(best) > 1:
        raise InputError(
            "the checkpoint holds more than one model of this kind: " + " and ".join(best),
            where=min(owner for owner in owners if owner.startswith(best[0])),
            fix="save the one that is wanted by itself",
        )
    return best[0]

"""A base model with a LoRA adapter merged into it, tensor by tensor as each is read (2106.09685; DoRA 2402.09353)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from rk_export.errors import InputError
from rk_export.model.parameter_names import ModelNames
from rk_export.source.adapter import ADAPTER_CONFIG, Adapter
from rk_export.source.leftovers import no_place
from rk_export.source.renamed_tensors import RenamedTensors
from rk_export.source.tensor_files import StoredTensors
from rk_export.source.weight_files import ADAPTER_WEIGHTS


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one matrix.

    Args:
        module: Path of the module in the adapter's names.
        parts: Stored name of each part.
        scale: Factor of the product of the pair.
        transposed: Whether the matrix is stored as (in, out), as embeddings and GPT-2's matrices are.
    """

    module: str
    parts: Mapping[str, str]
    scale: float
    transposed: bool


class LoraTensors:
    """Tensors of a base model as an adapter changes them; changed ones are float32.

    Args:
        base: By the names of the model's parameters.
        adapter: What is stored.
        changes: Of each changed matrix, by its name.
        biases: Stored name of the change of each changed bias, with its factor, by the bias's name.
        whole: Stored name of each replaced tensor, by its name.
    """

    def __init__(
        self,
        base: StoredTensors,
        adapter: Adapter,
        changes: Mapping[str, Change],
        biases: Mapping[str, tuple[str, float]],
        whole: Mapping[str, str],
    ) -> None:
        self._base, self._adapter = base, adapter
        self._changes, self._biases, self._whole = changes, biases, whole

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        stored = self._adapter.tensors.shapes
        return {**self._base.shapes, **{name: stored[own] for name, own in self._whole.items()}}

    @property
    def files(self) -> frozenset[Path]:
        return self._base.files | self._adapter.tensors.files

    def place(self, name: str) -> str:
        adapter = str(self._adapter.folder / ADAPTER_WEIGHTS)
        if name in self._whole:
            return adapter
        changed = name in self._changes or name in self._biases
        return f"{self._base.place(name)} with {adapter}" if changed else self._base.place(name)

    def read(self, name: str) -> Tensor:
        whole = self._whole.get(name)
        tensor = self._base.read(name) if whole is None else self._adapter.tensors.read(whole)
        if (change := self._changes.get(name)) is not None:
            return self._changed(tensor.to(torch.float32), change)
        if (bias := self._biases.get(name)) is not None:
            stored, scale = bias
            return tensor.to(torch.float32) + scale * self._part(stored)
        return tensor

    def _part(self, stored: str) -> Tensor:
        return self._adapter.tensors.read(stored).to(torch.float32)

    def _changed(self, W: Tensor, change: Change) -> Tensor:
        """Return a matrix with its change; under DoRA every row has the length that was trained for it."""
        kind = "embedding_" if "embedding_A" in change.parts else ""
        A, B = (self._part(change.parts[f"{kind}{part}"]) for part in "AB")  # (rank, in), (out, rank)
        delta = change.scale * (B @ A)
        if (magnitude := change.parts.get("magnitude_vector")) is None:
            return W + (delta.T if change.transposed else delta)
        V = (W.T if change.transposed else W) + delta  # (out, in)
        lengths: Tensor = self._part(magnitude).flatten() / V.norm(dim=1)
        V = lengths[:, None] * V
        return (V.T if change.transposed else V).contiguous()


def merged(base: StoredTensors, names: ModelNames, adapter: Adapter) -> tuple[StoredTensors, list[str]]:
    """Return a base model's tensors with an adapter merged into them, and notices about what was done.

    A pair on one of two tied matrices, or a trained copy of one (`modules_to_save`), changes that one alone, as the
    adapter does where it is not merged; the model is untied then, unless the adapter was trained to keep the tie.

    Args:
        base: By the names of the model's parameters.
        names: Of the model.
        adapter: A LoRA adapter.

    Raises:
        InputError: If the adapter changes something that the base model does not have, or in another shape.
    """
    _check_family(names, adapter)
    base, notices = _with_tied_twins(base, names, adapter)
    changes: dict[str, Change] = {}
    biases: dict[str, tuple[str, float]] = {}
    kept = _kept_ties(base, names, adapter)
    whole = {
        _whole_name(name, names, adapter): stored
        for name, stored in adapter.whole.items()
        if name not in kept
    }
    for module, parts in adapter.pairs.items():
        if f"{module}.weight" in kept:
            continue
        name = _matrix_name(module, base, names, adapter)
        owner = names.module(name.removesuffix(".weight"))
        transposed = isinstance(owner, nn.Embedding) or type(owner).__name__ == "Conv1D"
        change = Change(module, parts, adapter.rule.scale(module), transposed)
        shape = adapter.tensors.shapes[whole[name]] if name in whole else base.shapes[name]
        _check_pair(change, shape, adapter)
        changes[name] = change
        if (bias := parts.get("bias")) is not None:
            biases[_bias_name(name, base, adapter)] = (bias, change.scale)
    return LoraTensors(base, adapter, changes, biases, whole), notices


def _check_family(names: ModelNames, adapter: Adapter) -> None:
    """Refuse a base model of another family than the class that the adapter says it was made on.

    Families share names and shapes, so a wrong base need not show in the tensors.
    """
    made_on = getattr(getattr(transformers, adapter.base_class or "", None), "config_class", None)
    wanted, given = getattr(made_on, "model_type", None), names.model.config.model_type
    if wanted is not None and str(wanted).removesuffix("_text") != str(given).removesuffix("_text"):
        raise InputError(
            f"the adapter was made on a {adapter.base_class}, the base model is of the type {given!r}",
            where=str(adapter.folder / ADAPTER_CONFIG),
            fix="give the base model that the adapter was trained on: --base MODEL",
        )


def _kept_ties(base: StoredTensors, names: ModelNames, adapter: Adapter) -> frozenset[str]:
    """Return the tied matrices whose change is that of the matrix that they share."""
    if not adapter.rule.keeps_ties:
        return frozenset()
    changed = {f"{module}.weight" for module in adapter.pairs} | adapter.whole.keys()
    return frozenset(
        target for target, source in names.ties.items() if source in changed and target not in base.shapes
    )


def _with_tied_twins(
    base: StoredTensors, names: ModelNames, adapter: Adapter
) -> tuple[StoredTensors, list[str]]:
    """Give both of two tied matrices a name where a pair or a trained copy changes one of them."""
    in_pairs = {f"{module}.weight" for module in adapter.pairs}
    changed = in_pairs | {_whole_name(name, names, adapter) for name in adapter.copied}
    stored = {name: name for name in base.shapes}
    notices = []
    for target, source in names.ties.items():
        touched = changed & {target, source}
        if not touched or (target in stored and source in stored):
            continue
        if adapter.rule.keeps_ties and source in touched:
            continue
        present = source if source in stored else target
        stored |= {target: stored[present], source: stored[present]}
        both = " (peft's merge_and_unload would change both.)" if touched & in_pairs else ""
        notices.append(
            f"The adapter changes {' and '.join(sorted(touched))} of the tied pair {source} and {target}: the two are "
            f"untied, as in the adapted model.{both}"
        )
    return (RenamedTensors(base, stored) if notices else base), notices


def _matrix_name(module: str, base: StoredTensors, names: ModelNames, adapter: Adapter) -> str:
    stored = f"{module}.weight"
    target = names.target(stored)
    name = stored if target is None or target.is_part else target.name
    if name not in base.shapes:
        raise _not_there(stored, names, adapter)
    return name


def _bias_name(matrix: str, base: StoredTensors, adapter: Adapter) -> str:
    name = f"{matrix.removesuffix('.weight')}.bias"
    if name not in base.shapes:
        raise InputError(
            f"the adapter adds to {name!r}, which the base model does not have",
            where=str(adapter.folder / ADAPTER_CONFIG),
            fix="an adapter with lora_bias goes with a base model that has biases",
        )
    return name


def _whole_name(name: str, names: ModelNames, adapter: Adapter) -> str:
    target = names.target(name)
    if target is None:
        raise _not_there(name, names, adapter)
    return name if target.is_part else target.name


def _not_there(name: str, names: ModelNames, adapter: Adapter) -> InputError:
    where = str(adapter.folder / ADAPTER_WEIGHTS)
    error = no_place([name], names.model.config, where)
    return InputError(f"the adapter does not fit its base model: {error.what}", where=where, fix=error.fix)


def _check_pair(change: Change, shape: tuple[int, ...], adapter: Adapter) -> None:
    """Hold the shapes of a pair to its matrix and to the configuration."""
    where = str(adapter.folder / ADAPTER_WEIGHTS)
    shapes = adapter.tensors.shapes
    kind = "embedding_" if "embedding_A" in change.parts else ""
    A, B = (shapes[change.parts[f"{kind}{part}"]] for part in "AB")
    expected = shape[::-1] if change.transposed else shape
    if len(A) != 2 or len(B) != 2 or (B[0], A[1]) != tuple(expected) or A[0] != B[1]:
        raise InputError(
            f"the pair of {change.module} has shapes {list(B)} and {list(A)}, its matrix has {list(expected)}",
            where=where,
            fix="give the base model that the adapter was trained on: --base MODEL",
        )
    if A[0] != (rank := adapter.rule.rank_of(change.module)):
        raise InputError(
            f"the pair of {change.module} has rank {A[0]}, {ADAPTER_CONFIG} says {rank}",
            where=where,
            fix="take both files from the same adapter",
        )
    magnitude = change.parts.get("magnitude_vector")
    if magnitude is not None and torch.Size(shapes[magnitude]).numel() != B[0]:
        raise InputError(
            f"the magnitudes of {change.module} have shape {list(shapes[magnitude])}, not [{B[0]}]",
            where=where,
            fix="save the adapter again",
        )

"""A checkpoint's tensors as the model's parameters: every stored tensor is used or named, and what is stored wins."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.model.config_checks import check_layers
from rk_export.model.outputs import classes_of
from rk_export.model.parameter_names import ModelNames, Target, renaming
from rk_export.source.adapter import Adapter
from rk_export.source.cut_tensors import cut
from rk_export.source.leftovers import is_backbone, missing, no_place
from rk_export.source.lora import merged
from rk_export.source.quantized.tensors import DequantizedTensors, dequantized, quantization_of
from rk_export.source.read_as import ReadAs
from rk_export.source.renamed_tensors import RenamedTensors, renamed, unwrapped
from rk_export.source.tensor_files import FLOATS, SafetensorFiles, StoredTensors
from rk_export.source.weight_files import open_tensors
from rk_export.source.wrapped import TextPart, adapter_of_family, adapter_of_text, text_part


@dataclass(frozen=True)
class ModelTensors:
    """What a model folder holds, as the model's own parameters.

    Args:
        config: As the files say it is; a model that config.json ties may be untied.
        names: Of the model's parameters.
        tensors: By those names; parts of a parameter, which transformers joins, by their stored names.
        notices: What a reader of config.json alone would not expect.
        quantized: The matrices that the checkpoint stores quantized; None where it stores floats.
        part: What a wrapper's checkpoint holds of the model; None where it is no wrapper's.
    """

    config: PretrainedConfig
    names: ModelNames
    tensors: StoredTensors
    notices: tuple[str, ...]
    quantized: DequantizedTensors | None = None
    part: TextPart | None = None


def model_tensors(folder: Path, read: ReadAs, adapter: Adapter | None = None) -> ModelTensors:
    """Open the tensors of a model folder, each under the name of its parameter.

    Args:
        folder: With safetensors files.
        read: What its config.json is read as; it is not changed.
        adapter: A LoRA adapter to merge into it.

    Raises:
        InputError: If a tensor is missing, left over, of another shape or type, or the adapter does not fit.
    """
    stated, config = read.config, copy.deepcopy(read.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the model that is built and exported is in floats
    files = open_tensors(folder, getattr(config, "transformers_weights", None))
    check_layers(config, len(files.shapes))
    names = ModelNames(config)
    if quantization_of(files, stated) is None:
        check_types(files, names)
    part = None if read.wrapper is None else text_part(files, read.wrapper, names)
    if part is None:
        tensors, notices = without_prefixes(_of_family(files, read), names)
        notices = [read.taken.notice, *notices] if read.taken else notices
    else:
        tensors, notices = part.tensors, [part.notice, *part.names.wrapper.notices]
    # Here the names are the model's own, and nothing is merged into the tensors yet.
    tensors = dequantized(tensors, stated, lambda name: names.target(name) is not None)
    quantized = tensors if isinstance(tensors, DequantizedTensors) else None
    if quantized is not None:
        notices = [*notices, quantized.notice]
    tensors, passed_over = named(cut(tensors, names), names, config)
    notices += passed_over
    if adapter is not None and part is not None:
        adapter, passed_over = adapter_of_text(adapter, part.names)
        notices += passed_over
    if adapter is not None and read.taken is not None:
        adapter = adapter_of_family(adapter, read.taken.stated)
    if adapter is not None:
        names, resized = _resized(names, config, adapter)
        tensors, merging = merged(tensors, names, adapter)
        notices += resized + merging
    tensors, ties = settled(tensors, names, config)
    notices += [*ties, *_backbone(names, config)]
    return ModelTensors(config, names, tensors, tuple(notices), quantized, part)


def _of_family(files: SafetensorFiles, read: ReadAs) -> StoredTensors:
    """Return the tensors of a model of an unknown type under the names of its class, which are those of its family."""
    if read.taken is None:
        return files
    name_of, known = renaming(read.taken.model), read.taken.model.state_dict().keys()
    names = {stored: name_of(stored) for stored in files.shapes}
    return renamed(files, {stored: name if name in known else stored for stored, name in names.items()})


def _backbone(names: ModelNames, config: PretrainedConfig) -> list[str]:
    """Say where the output projection of a decoder comes from that was saved without one."""
    classes = classes_of(config)
    tied = getattr(config, "tie_word_embeddings", False)
    if names.architecture.is_encoder or not tied or not classes or not all(map(is_backbone, classes)):
        return []
    return [
        f"The model is a {classes[0]}, without a head: its output projection is the embedding, as config.json says."
    ]


def _resized(names: ModelNames, config: PretrainedConfig, adapter: Adapter) -> tuple[ModelNames, list[str]]:
    """Take the size of the vocabulary from an adapter that brings an embedding or head of its own."""
    tables = {names.architecture.embedding, names.architecture.lm_head}
    for name, stored in adapter.whole.items():
        target = names.target(name)
        rows = next(iter(adapter.tensors.shapes[stored]), 0)
        if target and target.name.removesuffix(".weight") in tables and rows not in (0, config.vocab_size):
            had, config.vocab_size = config.vocab_size, rows
            notice = f"The adapter brings {target.name} with {rows} rows; the vocabulary of its base model has {had}."
            return ModelNames(config), [notice]
    return names, []


def check_types(files: SafetensorFiles, names: ModelNames) -> None:
    """Refuse weights that are not floats; for models whose config does not say that they are quantized.

    Raises:
        InputError: If a tensor holds integers or 8-bit floats.
    """
    types = files.types
    for name, stored in types.items():
        if stored in FLOATS or names.is_harmless(name):
            continue
        if stored == "U32" and f"{name.rpartition('.')[0]}.biases" in types:
            raise InputError(
                f"an MLX checkpoint (mlx_lm): {name!r} is packed, with .scales and .biases beside it",
                where=files.place(name),
                fix="use the original model that it was converted from",
            )
        raise InputError(
            f"tensor {name!r} is stored as {stored}, and no quantization_config in config.json says what the values "
            "mean: there are no scales to read them with",
            where=files.place(name),
            fix="use the original model, or restore quantization_config in config.json",
        )


def without_prefixes(tensors: StoredTensors, names: ModelNames) -> tuple[StoredTensors, list[str]]:
    """Return tensors without the prefixes of wrappers and of larger models, and a notice where there were some."""
    architecture = names.architecture
    result, prefix = unwrapped(tensors, architecture.layers, names.base, names.layer_modules)
    return result, [f"The tensors are read without {prefix!r} in their names."] if prefix else []


def named(
    tensors: StoredTensors, names: ModelNames, config: PretrainedConfig
) -> tuple[StoredTensors, list[str]]:
    """Return the tensors under the names of the model's parameters, and notices about what is passed over.

    Parts of a parameter, such as the experts of a stack, keep their stored names: transformers joins them.

    Raises:
        InputError: If a tensor has no place in the model, or two have the same.
    """
    targets = {name: names.target(name) for name in tensors.shapes}
    leftovers = [name for name, target in targets.items() if target is None and not names.is_harmless(name)]
    notices: list[str] = []
    if names.architecture.is_encoder:
        leftovers, notices = _without_heads(leftovers, names)
    if leftovers:
        raise no_place(sorted(leftovers), config, tensors.place(min(leftovers)))
    base = f"{names.base}."
    new = {name: _new_name(name, target, base) for name, target in targets.items() if target is not None}
    return renamed(tensors, new), notices


def _without_heads(leftovers: list[str], names: ModelNames) -> tuple[list[str], list[str]]:
    """Return what is left without the tensors of a pretraining head and of unused modules, and a notice of the head."""
    bare = {name: name.removeprefix(f"{names.base}.") for name in leftovers}
    unused = tuple(f"{path.removeprefix(f'{names.base}.')}." for path in names.architecture.unused)
    heads = [name for name, own in bare.items() if own.startswith(names.architecture.pretraining)]
    left = [name for name, own in bare.items() if name not in heads and not own.startswith(unused)]
    if not heads:
        return left, []
    modules = ", ".join(dict.fromkeys(f"{bare[name].partition('.')[0]}.*" for name in heads))
    return left, [
        f"The pretraining head ({len(heads)} tensors, {modules}) is left out: an encoder bundle gives hidden states."
    ]


def _new_name(stored: str, target: Target, base: str) -> str:
    if not target.is_part:
        return target.name
    return base + stored if target.name.startswith(base) and not stored.startswith(base) else stored


def settled(
    tensors: StoredTensors, names: ModelNames, config: PretrainedConfig
) -> tuple[StoredTensors, list[str]]:
    """Decide which parameters are tied, as `PreTrainedModel.tie_weights` does on loading, and check the rest.

    A tied parameter whose own values are stored is untied, in `config` too; with equal values it stays tied.

    Args:
        tensors: By the names of the model's parameters.
        names: Of the model.
        config: Its `tie_word_embeddings` is set to false where the files say so.

    Raises:
        InputError: If a parameter is missing or has another shape.
    """
    stored = {name: name for name in tensors.shapes}
    notices = []
    for target, source in names.ties.items():
        if target in stored and source in stored:
            if _are_equal(tensors, target, source):
                del stored[target]
                continue
            config.tie_word_embeddings = False
            notices.append(
                f"config.json ties {target} to {source}, but each has stored values of its own: both are used, as "
                "transformers does, and the model is exported untied."
            )
        elif target in stored:
            stored[source] = stored.pop(target)
    result = (
        tensors
        if all(a == b for a, b in stored.items()) and len(stored) == len(tensors.shapes)
        else RenamedTensors(tensors, stored)
    )
    _check_complete(result, names, config)
    return result, notices


def _are_equal(tensors: StoredTensors, first: str, second: str) -> bool:
    if tensors.shapes[first] != tensors.shapes[second]:
        return False
    one, other = (tensors.read(name).to(torch.float32) for name in (first, second))
    return torch.equal(one, other)


def _check_complete(tensors: StoredTensors, names: ModelNames, config: PretrainedConfig) -> None:
    """Hold names and shapes to those of the model."""
    covered: set[str] = set()
    parts: dict[Target, list[str]] = defaultdict(list)
    for name, shape in tensors.shapes.items():
        target = names.target(name)
        if target is None:
            raise ValueError(f"{name} was to be refused earlier")
        covered.add(target.name)
        if target.is_part:
            parts[target].append(name)
        elif shape != (expected := names.shapes[target.name]):
            raise _wrong_shape(name, shape, expected, config)
    values: Counter[str] = Counter()
    for target, stored in parts.items():
        _check_stack(tensors, target, stored, names.shapes[target.name][0])
        values[target.name] += sum(math.prod(tensors.shapes[name]) for name in stored)
    for stack, count in values.items():
        if count != (wanted := math.prod(names.shapes[stack])):
            raise InputError(
                f"its parts in the files hold {count} values, the config asks for {wanted}",
                where=stack,
                fix="the checkpoint is incomplete, or config.json is not its own: download both again",
            )
    tied = names.ties.keys() if getattr(config, "tie_word_embeddings", False) else ()
    unused = names.architecture.unused if names.architecture.is_encoder else ()
    absent = [
        name
        for name, _ in names.model.named_parameters(remove_duplicate=False)
        if name not in covered and name not in tied and not name.startswith(unused)
    ]
    if absent:
        head = names.architecture.lm_head
        folder = str(min(tensors.files).parent)
        raise missing(absent, list(covered), config, None if head is None else f"{head}.weight", folder)


def _check_stack(tensors: StoredTensors, target: Target, stored: list[str], count: int) -> None:
    """Hold the parts of a stack of experts to their number, and to one shape."""
    shapes = tensors.shapes
    ((usual, _),) = Counter(shapes[name] for name in stored).most_common(1)
    for name in stored:
        if shapes[name] != usual:
            raise InputError(
                f"it has shape {list(shapes[name])}, the other experts have {list(usual)}",
                where=name,
                fix="the checkpoint is damaged: download it again",
            )
    if len(stored) != count:
        raise InputError(
            f"{len(stored)} of the {count} tensors of {target.name} are there, "
            f"{', '.join(stored[:2])} ...: the config asks for {count} experts",
            where=tensors.place(stored[0]),
            fix="the checkpoint is incomplete, or config.json is not its own: download both again",
        )


def _wrong_shape(
    name: str, shape: tuple[int, ...], expected: tuple[int, ...], config: PretrainedConfig
) -> InputError:
    fix = "config.json and the weights do not belong together"
    if expected[:1] == (config.vocab_size,) != shape[:1] and shape[1:] == expected[1:] and shape:
        fix = f"the vocabulary was resized after config.json was written: set vocab_size to {shape[0]} there"
    return InputError(
        f"it has shape {list(shape)}, the config asks for {list(expected)}", where=name, fix=fix
    )

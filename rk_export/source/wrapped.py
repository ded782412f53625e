"""The text model's part of a wrapper's checkpoint, and of an adapter that was trained on a wrapper."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import transformers
from transformers import PretrainedConfig

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.model.config_checks import check_counts
from rk_export.model.families.registry import architecture_of
from rk_export.model.parameter_names import ModelNames
from rk_export.model.wrapper_names import WrapperNames
from rk_export.model.wrappers import Wrapper
from rk_export.report.humanize import size
from rk_export.source.adapter import ADAPTER_CONFIG, Adapter
from rk_export.source.leftovers import check_kind
from rk_export.source.renamed_tensors import renamed, without_wrappers
from rk_export.source.tensor_files import SafetensorFiles, StoredTensors

Value = TypeVar("Value")

# Bits of a number, by the way safetensors writes its type.
_BITS = re.compile(r"\d+")


@dataclass(frozen=True)
class TextPart:
    """What a wrapper's checkpoint holds of the text model.

    Args:
        names: Of the wrapper's tensors.
        tensors: Of the text model, by its own names or the older ones that transformers knows for it.
        left_out: How many other tensors there are.
        left_out_bytes: What these take in the files.
    """

    names: WrapperNames
    tensors: StoredTensors
    left_out: int
    left_out_bytes: int

    @property
    def notice(self) -> str:
        """What the reader of the report must know."""
        text, wrapper = self.names.wrapper.text.model_type, self.names.wrapper.model_type
        held = (
            f": {self.left_out} tensors, {size(self.left_out_bytes)}"
            if self.left_out
            else "; its tensors are not in the files"
        )
        return (
            f"The model is a {wrapper}, which reads more than text. The bundle is the {text} model in it and takes "
            f"text alone. The rest is left out{held}."
        )


def check_wrapper(wrapper: Wrapper, path: Path) -> None:
    """Refuse a wrapper whose text model is not exported, or that has another head.

    Args:
        wrapper: What config.json says.
        path: The file, for messages.

    Raises:
        InputError: If it was saved with a head of another kind, or a size in it is below one.
        UnsupportedModelError: Names the wrapper and the text model's type.
    """
    check_kind(wrapper.config, is_wrapper=True)
    try:
        architecture_of(wrapper.text)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"the text model in this {wrapper.model_type} is a {wrapper.text.model_type!r}, which is not supported",
            where="config.json: text_config.model_type",
            fix=error.fix,
        ) from error
    if getattr(wrapper.text, "use_bidirectional_attention", False):
        # transformers gives two answers to text alone then: causal with eager attention, not causal with SDPA.
        raise UnsupportedModelError(
            f"this {wrapper.model_type} reads a prompt in both directions (use_bidirectional_attention), and the "
            "exported attention is causal",
            where="config.json: text_config",
            fix="use a model that was trained with causal attention",
        )
    check_counts(wrapper.text, path)


def text_part(files: SafetensorFiles, wrapper: Wrapper, text: ModelNames) -> TextPart:
    """Find the text model's tensors in a wrapper's files.

    Args:
        files: The checkpoint.
        wrapper: What config.json says.
        text: Names of the text model.

    Raises:
        InputError: If two tensors are the same one of the text model.
        UnsupportedModelError: As `WrapperNames`.
    """
    names = WrapperNames(wrapper, text)
    found = {stored: names.of_text(without_wrappers(stored)) for stored in files.shapes}
    others = [stored for stored, name in found.items() if name is None]
    types, shapes = files.types, files.shapes
    return TextPart(
        names,
        renamed(files, {stored: name for stored, name in found.items() if name is not None}),
        len(others),
        sum(math.prod(shapes[name]) * _bits(types[name]) // 8 for name in others),
    )


def _bits(stored: str) -> int:
    """Return the bits of a number of a type, such as 16 of BF16; a truth value takes a byte."""
    match = _BITS.search(stored)
    return int(match[0]) if match else 8


def adapter_of_text(adapter: Adapter, names: WrapperNames) -> tuple[Adapter, list[str]]:
    """Return an adapter that was trained on a wrapper as one of the text model, and a notice about the rest of it.

    Args:
        adapter: Of the wrapper, or of the text model itself.
        names: Of the wrapper.

    Raises:
        InputError: If it changes nothing of the text model.
    """
    pairs = {module: _module(names, module) for module in adapter.pairs}
    whole = {name: names.of_text(name) for name in adapter.whole}
    left_out = sum(name is None for name in (*pairs.values(), *whole.values()))
    if left_out == len(pairs) + len(whole):
        raise InputError(
            f"the adapter changes nothing of the text model in this {names.wrapper.model_type}",
            where=str(adapter.folder / ADAPTER_CONFIG),
            fix="leave it out: a bundle reads text alone",
        )
    rule = adapter.rule
    text = replace(
        adapter,
        rule=replace(
            rule,
            ranks={re.escape(new): rule.rank_of(old) for old, new in pairs.items() if new},
            alphas={re.escape(new): rule.alpha_of(old) for old, new in pairs.items() if new},
        ),
        pairs=_with_new_names(adapter.pairs, pairs),
        whole=_with_new_names(adapter.whole, whole),
        copied=frozenset(new for old in adapter.copied if (new := whole[old])),
    )
    text = adapter_of_family(text, names.wrapper.config)
    notice = f"The adapter also changes {left_out} modules that do not read text; these are left out."
    return text, [notice] if left_out else []


def adapter_of_family(adapter: Adapter, stated: PretrainedConfig) -> Adapter:
    """Return an adapter without the class that it was made on, where that is the class of a config.

    The model is then read as one of another family, and the class would not fit it.
    """
    made_on = getattr(getattr(transformers, adapter.base_class or "", None), "config_class", None)
    return replace(adapter, base_class=None) if made_on is type(stated) else adapter


def _module(names: WrapperNames, module: str) -> str | None:
    name = names.of_text(f"{module}.weight")
    return None if name is None else name.removesuffix(".weight")


def _with_new_names(values: Mapping[str, Value], new: Mapping[str, str | None]) -> dict[str, Value]:
    return {name: value for old, value in values.items() if (name := new[old]) is not None}

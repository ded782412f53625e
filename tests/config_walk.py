"""One value after another in a family's config.json, and what becomes of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from compressed import OnnxModel, compress, floats, logits
from config_changes import Change, changes
from exactness import BOUND, prefill_error, rounding, steps_error, words
from tiny_models import family_of, random_model, tiny_config
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from rk_export.errors import RkExportError
from rk_export.graph.dense.frontend import build_module, check_supported
from rk_export.model.context import own_context
from rk_export.model.description import ModelDescription, describe
from rk_export.model.families.registry import architecture_of
from rk_export.source.stored import open_source, read_config

LENGTH = 24
ROUNDING = 4.0  # the graph may be so many times as far from transformers as its float32 is from its float64
FAILED, REFUSED, WITHOUT_EFFECT, EXACT = "transformers builds none", "refused", "without effect", "exact"


class Walk:
    """A family's tiny model, and what becomes of changes of its config.

    Args:
        name: Of the family or a variant.
        folder: For files.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.stated = {"model_type": tiny_config(name).model_type, **_given(name)}
        self.is_encoder = family_of(name).is_encoder
        config = self._config(self.stated)
        model = random_model(name, config)
        self.ids = words(2, LENGTH)
        self.logits, self.reading = logits(model, self.ids), _reading(describe(read_config(folder)))
        self.changes = list(changes(config, model))

    def outcome(self, change: Change) -> tuple[str, str]:
        """Return what becomes of a change, and why it was refused.

        Raises:
            AssertionError: None of what may become of it.
        """
        try:
            config = self._config({**self.stated, change.field: change.value})
            if not _is_same_kind(config, self.is_encoder):
                return FAILED, "it is a model of another kind, which another entry tests"
            model = random_model(self.name, config)
            expected = logits(model, self.ids)
        except (
            Exception
        ) as error:  # the classes check little: a wrong value raises whatever its first use does
            return FAILED, str(error)
        if not expected.isfinite().all():
            return FAILED, "its logits are not finite"
        try:
            description = describe(read_config(self.folder))
            check_supported(description, ep="cpu", dtype="fp32")
        except RkExportError as error:
            return REFUSED, _named({*change.names, config.attribute_map.get(change.field, "")} - {""}, error)
        if _equal(expected, self.logits) and _reading(description) == self.reading:
            return WITHOUT_EFFECT, ""
        self._compare(model, change)
        return EXACT, ""

    def _compare(self, model: PreTrainedModel, change: Change) -> None:
        stated = (self.folder / "config.json").read_text("utf-8")
        model.save_pretrained(self.folder)
        (self.folder / "config.json").write_text(stated, "utf-8")
        graph = OnnxModel(compress(open_source(self.folder), floats()), self.folder)
        length = min(LENGTH, own_context(model.config))
        error = prefill_error(graph, model, length)
        if length == LENGTH and not self.is_encoder:
            error = max(error, steps_error(graph, model, length))
        if error > BOUND:  # some values make a model that rounding disturbs more
            own = rounding(model, self.ids[:, :length])
            assert error <= ROUNDING * own, (
                f"the graph computes other logits: {error:.2g}, rounding {own:.2g}"
            )

    def _config(self, stated: dict[str, Any]) -> Any:
        (self.folder / "config.json").write_text(json.dumps(stated), "utf-8")
        return AutoConfig.from_pretrained(self.folder)


def _given(name: str) -> dict[str, Any]:
    """Return the fields of a tiny config as a file states them: what follows from others is left out."""
    return family_of(name).config_fields(name.partition(":")[2])


def _is_same_kind(config: Any, is_encoder: bool) -> bool:
    """Whether a config is that of an encoder as before: some fields make one of a decoder."""
    return architecture_of(config).is_encoder == is_encoder


def _named(names: set[str], error: RkExportError) -> str:
    text = " ".join(str(part) for part in (error.what, error.where, error.fix) if part)
    assert any(name in text for name in names), f"refused without naming the field: {text}"
    return str(error.what)


def _equal(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool(torch.equal(actual, expected))


def _reading(description: ModelDescription) -> Any:
    """Return what a graph is built from, in a form that can be compared."""
    module = build_module(description, ep="cpu", dtype="fp32")
    shapes = {name: tuple(parameter.shape) for name, parameter in module.module.named_parameters()}
    spec = description.spec
    late = {
        parameter.name: parameter.late.numpy().tobytes()
        for parameter in module.module.parameters()
        if hasattr(parameter, "late")
    }
    return shapes, spec, late, str(module.config)

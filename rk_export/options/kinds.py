"""Every kind of step that a recipe may hold."""

from __future__ import annotations

from importlib import import_module

from rk_export.options.correct import Correct
from rk_export.options.factorize import Factorize
from rk_export.options.prepare import Prepare
from rk_export.options.quantize import Quantize
from rk_export.options.step import STAGES, MethodOptions, Step


def step_kinds() -> tuple[type[Step], ...]:
    """Return every kind of step, in the order of the stages."""
    methods: tuple[type[MethodOptions], ...] = import_module(
        "rk_export.methods"
    ).METHODS  # it stands above us
    kinds: list[type[Step]] = [Prepare, Factorize, Quantize, Correct, *methods]
    return tuple(sorted(kinds, key=lambda kind: STAGES.index(kind.stage)))

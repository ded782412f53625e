"""The contract of a method: what it may do on the way from a dense model to a compressed one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from rk_export.calibration.dense_statistics import DenseStatistics
from rk_export.matrix_id import MatrixId
from rk_export.model.sites import plain_sites
from rk_export.options.recipe import Recipe
from rk_export.options.step import MethodOptions
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.plan import Plan, Pruning, SitePlan
from rk_export.report.records import Finding
from rk_export.rewrite.apply import Rewritten
from rk_export.source.protocol import Source
from rk_export.source.transformed import Transformed

OptionsT = TypeVar("OptionsT", bound=MethodOptions)


@dataclass(frozen=True)
class Work:
    """What a method works on.

    Args:
        source: The model as the methods before left it.
        recipe: Everything that was asked for.
        device: Where to compute.
        tokens: Calibration text, int64 (sequences, length); None where none is used.
        statistics: Of `source`, once they are taken.
        pruning: What structures a plan keeps; None leaves the choice.
        state: Where a training keeps its progress, to go on after an interruption; None keeps none.
    """

    source: Transformed
    recipe: Recipe
    device: torch.device
    tokens: Tensor | None = None
    statistics: DenseStatistics | None = None
    pruning: Pruning | None = None
    state: Path | None = None


@dataclass(frozen=True)
class Decision:
    """What a method decided about every matrix. A plan says how much is kept of each, not which parts.

    Args:
        sites: The matrices of all layers, each a site of its own.
        parts: Low rank and sparse parts of those in the sparse form.
    """

    sites: tuple[SitePlan, ...]
    parts: Mapping[MatrixId, Parts] = field(default_factory=dict)

    def plan(self, source: Source, recipe: Recipe) -> Plan:
        """Return the plan that stores every matrix as it was decided."""
        return Plan(source.config.model_type, source.structure(), recipe, self.sites, recipe.table_quant)


class Method(Generic[OptionsT]):
    """One method at work; it lives for one compression. Every hook may be left as it is.

    Args:
        options: What it was asked for.
    """

    # Whether recovery aims at the model that this method leaves, not at the dense one.
    sets_target = False

    def __init__(self, options: OptionsT) -> None:
        self.options = options
        self.findings: tuple[Finding, ...] = ()

    @property
    def doing(self) -> str:
        """What it does in its stage, for the log."""
        return self.options.describe()

    def check(self, source: Source, recipe: Recipe) -> None:
        """Refuse, before any work, what it cannot do to a model.

        Raises:
            InputError: Says why.
        """

    def transform(self, work: Work) -> Transformed:
        """Return the model that is compressed, before statistics are taken of it."""
        return work.source

    def decide(self, work: Work) -> Decision | None:
        """Return what becomes of every matrix; None leaves that to the planner."""
        return None

    def recover(self, rewritten: Rewritten, teacher: Source, work: Work) -> Rewritten:
        """Return the rewritten model after training it towards a teacher."""
        return rewritten


def method_of(options: MethodOptions) -> Method[MethodOptions]:
    """Return the method of some options, from the folder that its options lie in."""
    folder = type(options).__module__.rpartition(".")[0]
    made: Method[MethodOptions] = import_module(f"{folder}.method").METHOD(options)
    return made


def methods_of(recipe: Recipe) -> Sequence[Method[MethodOptions]]:
    """Return the methods that were asked for, in the order in which they work."""
    return [method_of(asked) for asked in recipe.methods]


def matrices(source: Source) -> list[SitePlan]:
    """Return every matrix of a model's layers as a dense site of its own, in floats."""
    return [
        site
        for layer in source.description.layers()
        for site in plain_sites(layer, source.description.projections(layer.index))
    ]

"""What is done to a model's weights: an ordered list of steps, and what they are weighed and paid by."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TypeVar

from rk_export.options.calibration import CalibrationOptions
from rk_export.options.correct import Correct
from rk_export.options.factorize import Factorize
from rk_export.options.prepare import Prepare
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.quantize import TABLES, Quantize, Rounding, names_of, names_of_table
from rk_export.options.ranks import Budget, Gauge, RankRule
from rk_export.options.recipe_checks import check_recipe
from rk_export.options.step import STAGES, MethodOptions, Step
from rk_export.options.target import Target
from rk_export.options.texts import TextFile

logger = logging.getLogger(__name__)

StepT = TypeVar("StepT", bound=Step)


@dataclass(frozen=True)
class Recipe:
    """What is done to a model's weights. Without steps the model stays dense and in floats.

    Args:
        steps: What is done, in this order: prune and prepare, at most one step that decides what stays of every
            matrix, quantize, correct, heal.
        calibration: The text that errors are weighed by.
        budget: What the whole model may cost. Steps that leave something open are decided by it.
        target: Where the bundle will run.
    """

    steps: tuple[Step, ...] = ()
    calibration: CalibrationOptions = CalibrationOptions()
    budget: Budget | None = None
    target: Target = Target()

    def __post_init__(self) -> None:
        check_recipe(self)

    @classmethod
    def load(cls, name: str | Path) -> Recipe:
        """Return a preset by its name, or a recipe file.

        Raises:
            InputError: There is no such preset and no such file, or the file is no recipe; with line and column.
        """
        recipe: Recipe = import_module("rk_export.recipes").load(name)  # it stands above us
        return recipe

    def find(self, kind: type[StepT]) -> StepT | None:
        """Return the first step of a kind, or None."""
        return next((step for step in self.steps if isinstance(step, kind)), None)

    def with_step(self, step: Step) -> Recipe:
        """Return the recipe with a step in the place of the first of its kind, or where it belongs by its stage."""
        steps = list(self.steps)
        place = next((index for index, own in enumerate(steps) if own.name == step.name), None)
        if place is not None:
            steps[place] = step
        else:
            later = STAGES.index(step.stage)
            before = [index for index, own in enumerate(steps) if STAGES.index(own.stage) <= later]
            steps.insert(before[-1] + 1 if before else 0, step)
        return replace(self, steps=tuple(steps))

    def with_budget(self, budget: Budget) -> Recipe:
        """Return the recipe at another amount.

        A step that says itself how much stays gets the amount. Otherwise it becomes the recipe's budget, and a recipe
        that leaves nothing open may factorize every matrix.

        Raises:
            InputError: The step that says how much stays takes no such amount.
        """
        holder = self.deciding or self.find(Factorize)
        if holder is not None and (holder is self.deciding or self.rank is not None):
            return self.with_step(holder.with_amount(budget))
        opened = self
        if holder is None and (budget.kind == "keep" or not self.has_open_formats):
            logger.info("factorize: added to the recipe, so that the %s can be met", budget.name)
            opened = self.with_step(Factorize())
        return replace(opened, budget=budget)

    def with_texts(self, files: tuple[Path, ...]) -> Recipe:
        """Return the recipe with the paths of those texts that are among some files, by content."""
        if not files:
            return self
        calibration, corpus = self.calibration, self.calibration.corpus
        if corpus is not None:
            calibration = replace(calibration, text=corpus.found_in(files))
        steps = tuple(step.with_texts(files) for step in self.steps)
        return replace(self, steps=steps, calibration=calibration)

    @property
    def missing_text(self) -> TextFile | None:
        """The calibration text, where only its name and content are known."""
        corpus = self.calibration.corpus
        return corpus if corpus is not None and corpus.path is None else None

    @property
    def methods(self) -> tuple[MethodOptions, ...]:
        """The steps that have a folder of their own, in the order in which they work."""
        return tuple(step for step in self.steps if isinstance(step, MethodOptions))

    @property
    def deciding(self) -> MethodOptions | None:
        """The method that decides what stays of every matrix; None leaves that to ranks and budgets."""
        return next((method for method in self.methods if method.stage == "decide"), None)

    @property
    def limit(self) -> Budget | None:
        """The recipe's budget, or that of the method that decides."""
        own = None if self.deciding is None else self.deciding.budget
        return own or self.budget

    @property
    def weighs_outputs(self) -> bool:
        """Whether anything weighs the outputs of matrices by the loss; rounding weighs their inputs alone."""
        methods = any(method.weighs_outputs for method in self.methods)
        return bool(self.budget or self.rank or methods)

    @property
    def factorize(self) -> Factorize:
        """How matrices are factorized; without the step, the settings that it would have."""
        return self.find(Factorize) or Factorize()

    @property
    def groups(self) -> tuple[str, ...] | None:
        """Groups that may be factorized; None leaves their names to the model's family."""
        factorize = self.find(Factorize)
        return () if factorize is None else factorize.groups

    @property
    def rank(self) -> RankRule | None:
        """The rank rule of the groups; None leaves ranks to a budget."""
        return self.factorize.rule

    @property
    def gauge(self) -> Gauge:
        """Which factor carries the singular values."""
        return self.factorize.gauge

    @property
    def quantize_steps(self) -> tuple[Quantize, ...]:
        """The steps that store matrices in few bits."""
        return tuple(step for step in self.steps if isinstance(step, Quantize))

    @property
    def has_open_formats(self) -> bool:
        """Whether a budget may choose any format."""
        return any(step.bits == "auto" for step in self.quantize_steps)

    def quantize_step_of(self, names: tuple[str, ...]) -> Quantize | None:
        """Return the last step that takes a matrix."""
        return next((step for step in reversed(self.quantize_steps) if step.takes(names)), None)

    def format_of(self, role: str, path: str, layer: int) -> QuantSpec | None:
        """Return the format of a layer's matrix where no budget chooses it; None for floats."""
        step = self.quantize_step_of(names_of(role, path, layer))
        return None if step is None else step.spec(table=False)

    def is_open(self, role: str, path: str, layer: int) -> bool:
        """Whether a budget may choose the format of a layer's matrix."""
        step = self.quantize_step_of(names_of(role, path, layer))
        return step is not None and step.bits == "auto"

    @property
    def quant(self) -> QuantSpec | None:
        """The format of most matrices of the layers: or of those that are named first; None for floats."""
        named = (step for step in self.quantize_steps if set(step.targets) - set(TABLES))
        step = self.quantize_step_of(("all", "layers")) or next(named, None)
        return None if step is None else step.spec(table=False)

    @property
    def table_quant(self) -> QuantSpec | None:
        """The format of the embedding, and of an output projection of its own; None for floats."""
        step = self.quantize_step_of(names_of_table(TABLES[0]))
        return None if step is None else step.spec(table=True)

    @property
    def table_is_open(self) -> bool:
        """Whether a budget may choose the format of the embedding."""
        step = self.quantize_step_of(names_of_table(TABLES[0]))
        return step is not None and step.bits == "auto"

    @property
    def head_quant(self) -> QuantSpec | None:
        """The format that is asked for of an output projection."""
        step = self.quantize_step_of(names_of_table(TABLES[1]))
        return None if step is None else step.spec(table=True)

    @property
    def quantizer(self) -> Rounding:
        """How numbers are rounded; codes that cannot be carried over are rounded by GPTQ."""
        given = (step.quantizer for step in self.quantize_steps)
        return next((asked for asked in given if asked is not None and asked != "carry"), "gptq")

    @property
    def carries(self) -> bool:
        """Whether codes of a quantized checkpoint are taken over as they are."""
        return any(step.quantizer == "carry" for step in self.quantize_steps)

    @property
    def correction(self) -> int:
        """Rank of the branches that correct quantized matrices; 0 for none."""
        correct = self.find(Correct)
        return 0 if correct is None else correct.rank

    @property
    def preparations(self) -> tuple[str, ...]:
        """The reparameterizations that were named, or decided on."""
        prepare = self.find(Prepare)
        return () if prepare is None or prepare.names == "auto" else prepare.names

    @property
    def prepared_for(self) -> QuantSpec | None:
        """The format that reparameterizations are to be chosen for; None where they are named or nothing is rounded.

        A budget offers several formats: the one that rounds most of the model then stands for all.
        """
        prepare = self.find(Prepare)
        if prepare is None or prepare.names != "auto" or not self.calibration.uses_text:
            return None
        if self.carries:
            return None  # they would move the values off their grid
        if self.budget is not None and self.budget.kind == "speed_up" and self.quant is not None:
            return W8A8
        return self.quant

    def patterns(self) -> Iterator[str]:
        """Yield every name that a step uses for what it quantizes or leaves out."""
        for step in self.quantize_steps:
            yield from (*step.targets, *step.ignore)

    def describe(self) -> Iterator[str]:
        """Yield what is done to the model, in words for the model card."""
        for step in self.steps:
            nothing = isinstance(step, Factorize) and (step.groups == () or not (step.rule or self.budget))
            if not isinstance(step, Prepare) and not nothing:
                yield step.describe()

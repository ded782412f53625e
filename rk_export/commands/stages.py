"""What commands share: opening a model with its options, planning, and the stages' times."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rk_export.bundle.check_ends import check_ends
from rk_export.commands.checks import check_options
from rk_export.commands.compression_inputs import CompressionInputs, compression_inputs
from rk_export.commands.model_costs import model_costs
from rk_export.device import resolve_device
from rk_export.errors import InputError
from rk_export.folders import check_replaceable
from rk_export.graph.dense.frontend import check_supported
from rk_export.json_codec import to_json
from rk_export.manifest import library_versions
from rk_export.model.sentence_modules import takes_modules
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.options.target import Target
from rk_export.parity.preflight import Preflight, preflight
from rk_export.plan import Plan
from rk_export.planning import planner
from rk_export.planning.encoder_tables import with_encoder_table
from rk_export.planning.plain_size import plain_int4_bytes, why_plain
from rk_export.recipes import load
from rk_export.source.protocol import Source
from rk_export.source.sentence_head import read_sentence_head
from rk_export.source.stored import StoredModel, open_source
from rk_export.work_folder import WorkFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A model, and what is to be done with it; made before any work.

    Args:
        source: The dense model.
        recipe: What was asked for, its texts found on this machine.
        device: Where to compute.
        threads: Threads of ONNX Runtime.
        plan: What was decided earlier; None leaves it to be decided.
        notices: What became of the recipe otherwise than it says.
    """

    source: StoredModel
    recipe: Recipe
    device: torch.device
    threads: int | None = None
    plan: Plan | None = None
    notices: tuple[str, ...] = ()

    def preflight(self) -> Preflight:
        """Read the model as transformers does, and run it on the probe; refuse what cannot be exported."""
        found = preflight(self.source, self.recipe)
        return replace(found, notices=(*found.notices, *self.notices))

    def inputs(self, work: WorkFolder | None = None, probe: torch.Tensor | None = None) -> CompressionInputs:
        """Gather what compression starts from, to be rewritten on a probe; what can go on later is kept in `work`."""
        return compression_inputs(
            self.source,
            self.recipe,
            self.device,
            pruning=None if self.plan is None else self.plan.pruning,
            states=None if work is None else work.state,
            probe=probe,
            folder=None if work is None else work.path,
        )

    def identity(self) -> dict[str, str]:
        """Return what decides the result of a compression, as `WorkFolder.begin` takes it."""
        return {
            "the model": self.source.fingerprint(),
            "the recipe": json.dumps(to_json(self.recipe), sort_keys=True),
            "the plan": "" if self.plan is None else json.dumps(self.plan.to_json(), sort_keys=True),
            "the device": self.device.type,
            "a library's version": json.dumps(library_versions(), sort_keys=True),
        }

    def decided(self, inputs: CompressionInputs) -> Plan:
        """Return the plan that was given, or the one that follows from the options."""
        if self.plan is not None:
            return self.plan
        if inputs.decision is not None:
            plan = inputs.decision.plan(inputs.source, inputs.recipe)
        else:
            plan = self._planned(inputs)
        return replace(plan, pruning=inputs.source.pruning)

    def _planned(self, inputs: CompressionInputs) -> Plan:
        costs, budget = None, inputs.recipe.budget
        if budget is not None and budget.kind == "speed_up":
            costs = model_costs(inputs.dense, inputs.source, inputs.recipe, budget.phase, self.threads)
        return planner.decide_plan(
            inputs.source,
            inputs.recipe,
            statistics=inputs.statistics,
            table=inputs.table,
            costs=costs,
            device=self.device,
        )


def open_task(
    model: str | Path,
    recipe: Recipe | None,
    plan: Plan | None,
    *,
    target: Target | None = None,
    base: str | Path | None,
    run: Run | None,
    needs_texts: bool = True,
) -> Task:
    """Open a model, and refuse options or a plan that do not go with it.

    Args:
        model: As in `compress`.
        recipe: What was asked for; None takes the default.
        plan: What was decided earlier, instead of a recipe.
        target: Where the bundle will run, instead of what the recipe says.
        base: As in `compress`.
        run: The machine.
        needs_texts: Refuse a plan whose calibration text is not at hand.

    Raises:
        InputError: If the model, an option or the plan cannot be used, or both of the latter are given.
        UnsupportedModelError: If the family cannot be exported exactly.
        ProviderError: If CUDA was asked for and is absent.
    """
    run = run or Run()
    source = open_source(model, base)
    if plan is not None and recipe is not None:
        raise InputError(
            "a plan already holds its recipe", where="--plan", fix="drop the recipe and what changes it"
        )
    if plan is not None:
        if target is not None:
            raise InputError("a plan already holds its target", where="--plan", fix="drop --ep")
        planner.check_plan(source, plan)
        recipe = plan.recipe
    recipe = recipe or load()
    if target is not None:
        recipe = replace(recipe, target=target)
    recipe = recipe.with_texts(run.texts)
    notices: tuple[str, ...] = ()
    if plan is None:
        recipe, notices = _settled(source, recipe)
    check_supported(source.description, ep=recipe.target.ep, dtype=recipe.target.float_dtype)
    if takes_modules(source.description):
        read_sentence_head(source.folder, source.config)  # refuses modules that the graph cannot have
    check_options(source, recipe)
    if needs_texts and recipe.missing_text is not None:
        recipe.missing_text.place()
    if not source.architecture.is_encoder:
        check_ends(source.folder, source.config, source.origin[1])
    return Task(source, recipe, resolve_device(run.device), run.threads, plan, notices)


def _settled(source: Source, recipe: Recipe) -> tuple[Recipe, tuple[str, ...]]:
    """Return a recipe whose size is a number, and why formats that it leaves open are plain INT4 after all."""
    budget, why = recipe.budget, ""
    if budget is not None and budget.value == "int4":
        why = why_plain(source, recipe)
        budget = None if why else Budget("size", float(plain_int4_bytes(source, recipe)))
    elif recipe.has_open_formats and (budget is None or budget.kind == "keep"):
        why = "bits: auto is 4 bits, and 8 for the embedding, where no budget counts bits"
        if source.architecture.is_encoder:
            why = "bits: auto is 4 bits where no budget counts bits"
    recipe, notices = replace(recipe, budget=budget), (f"plain INT4: {why}",) if why else ()
    if source.architecture.is_encoder:
        recipe, more = with_encoder_table(recipe)
        notices = (*notices, *more)
    for notice in notices:
        logger.info("%s", notice)
    return recipe, notices


def check_outputs(
    source: Source, out: str | Path, checkpoint: str | Path | None = None, force: bool = False
) -> None:
    """Refuse outputs that cannot be written, or would take the place of the model or of each other."""
    target = Path(out).expanduser()
    check_replaceable(target, force, inputs=source.places)
    if checkpoint is not None:
        check_replaceable(Path(checkpoint), force, inputs=[*source.places, target])

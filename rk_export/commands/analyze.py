"""Spectral analysis of a model: singular values, effective ranks and energy of every group (2402.16319)."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import torch

from rk_export.commands.stages import Task, check_outputs, open_task
from rk_export.folders import AtomicFolder
from rk_export.manifest import library_versions
from rk_export.model.sites import dense_sites
from rk_export.options.ranks import GROUPS
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.passes.base import Layer
from rk_export.passes.numerics.joint_svd import singular_values
from rk_export.passes.numerics.ranks import spectrum
from rk_export.passes.weights.factorize import stacked_pairs
from rk_export.plan import Plan, SitePlan
from rk_export.planning import planner
from rk_export.planning.planner import default_groups
from rk_export.progress import track
from rk_export.report.plots import save_spectra_plots
from rk_export.report.records import Report, Spectrum
from rk_export.report.render import html
from rk_export.source.protocol import Source


def spectra(source: Source, plan: Plan, device: torch.device) -> Iterator[Spectrum]:
    """Yield the spectrum of every site that a plan factorizes, at its rank, and of the groups that stayed dense.

    Args:
        source: The model that the plan was made for.
        plan: Names the sites; where it factorizes nothing and names no groups, the default groups are drawn.
        device: Where spectra are computed.
    """
    groups = plan.recipe.groups or default_groups(source)
    drawn = {GROUPS[group] for group in groups}
    for layer in track(source.layers(), "spectra of layers", source.layer_count):
        sites = plan.of_layer(layer.index)
        for site in sites if any(site.rank for site in plan.sites) else _grouped(source, layer, groups):
            if site.rank == 0 and site.members not in drawn:
                continue
            for target, rows in stacked_pairs(layer, site):
                stacked = torch.cat([linear.weight.to(device) for linear in rows.values()])
                yield spectrum(target, singular_values(stacked).cpu(), site.rank or None)


def _planned(task: Task) -> tuple[Source, Plan]:
    """Return a plan and the model that it was made for; text is read only where ranks depend on it."""
    options = task.recipe
    reads_text = options.budget is not None or options.factorize.allocation != "uniform" or options.methods
    if task.plan is None and not reads_text:
        return task.source, planner.decide_plan(task.source, options, device=task.device)
    if task.plan is not None and task.plan.pruning is None:
        return task.source, task.plan
    inputs = task.inputs()
    return inputs.source, task.decided(inputs)


def _grouped(source: Source, layer: Layer, groups: tuple[str, ...]) -> list[SitePlan]:
    projections = source.description.projections(layer.index)
    return dense_sites(layer, projections, Recipe(), groups)


def analyze(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    plan: Plan | None = None,
    base: str | Path | None = None,
    run: Run | None = None,
    command: str = "",
    force: bool = False,
) -> Report:
    """Write spectra as JSON, plots and one HTML page into a folder; return the report.

    Args:
        model: HF folder, hub id or GGUF file.
        out: Folder for report.json, report.html and the plots.
        recipe: As in `compress`: the ranks that they lead to are marked.
        plan: A plan whose ranks are marked, instead of a recipe.
        base: Base model of a LoRA adapter; None takes the one that it names.
        run: The machine.
        command: Command line to note in the report.
        force: Replace an existing output.

    Raises:
        InputError: If the folder exists and `force` is not set, or the model is broken.
    """
    if recipe is None and plan is None:
        recipe = Recipe()  # the spectra of the default groups, no rank marked
    task = open_task(model, recipe, plan, base=base, run=run)
    source = task.source
    check_outputs(source, out, force=force)
    with AtomicFolder(out, force=force) as partial:
        planned_for, decided = _planned(task)
        found = tuple(spectra(planned_for, decided, task.device))
        report = Report(
            model=source.title,
            model_type=source.config.model_type,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            command=command,
            versions=library_versions(),
            spectra=found,
            notices=source.notices,
        )
        report.save(partial / "report.json")
        (partial / "report.html").write_text(html(report), encoding="utf-8")
        save_spectra_plots(report.spectra, partial)
    return report

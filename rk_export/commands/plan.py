"""The plan of a model, to read, to edit and to apply."""

from __future__ import annotations

from pathlib import Path

from rk_export.commands.stages import open_task
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.options.target import Target
from rk_export.plan import Plan


def make_plan(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    target: Target | None = None,
    base: str | Path | None = None,
    run: Run | None = None,
) -> Plan:
    """Return the plan that `compress` would apply; the arguments are those of `compress`.

    Raises:
        InputError: If the model or an option cannot be used.
        UnsupportedModelError: If the family cannot be exported exactly.
    """
    task = open_task(model, recipe, None, target=target, base=base, run=run)
    task.preflight()
    return task.decided(task.inputs())

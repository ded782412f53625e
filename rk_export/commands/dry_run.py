"""What `compress` would take on this machine, stage by stage, known in seconds: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rk_export.commands.machine_rates import machine_rates
from rk_export.commands.requirements import Room, job_of, known_plan, room, run_needs
from rk_export.commands.stages import Task, check_outputs, open_task
from rk_export.json_codec import to_json
from rk_export.model.context import context_notices
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.options.target import Target
from rk_export.plan import Plan
from rk_export.planning.fixed_parts import fixed_findings
from rk_export.planning.resources import KINDS, StageNeeds, Term
from rk_export.report import humanize
from rk_export.report.records import Finding
from rk_export.report.table import Block, Column, make_table
from rk_export.report.tables import matrices_table
from rk_export.rewrite.sizes import planned_findings
from rk_export.source.tokenizer_conversion import check_tokenizer


@dataclass(frozen=True)
class Estimate:
    """What one stage would take here.

    Args:
        stage: As the log names it.
        memory: Peak of the anonymous memory, in bytes.
        gpu: Peak of the device's memory, in bytes.
        disk: Peak of what lies in work folder, cache and output, in bytes.
        seconds: How long it takes.
        parts: What memory, device and disk consist of.
    """

    stage: str
    memory: int
    gpu: int
    disk: int
    seconds: float
    parts: tuple[Term, ...]


@dataclass(frozen=True)
class DryRun:
    """What a compression would take and make.

    Args:
        model: Name of the model.
        stages: What each stage takes.
        room: What there is.
        output_bytes: Of the bundle's model files: of a budget of bytes its amount, elsewhere what shapes tell.
        findings: What becomes of each matrix where shapes alone or a plan tell it, and what is stored beside them.
        notices: What the reader must know.
        rates: What this machine does in a second, by kind of work.
    """

    model: str
    stages: tuple[Estimate, ...]
    room: Room
    output_bytes: int
    findings: tuple[Finding, ...]
    notices: tuple[str, ...]
    rates: dict[str, float]

    @property
    def seconds(self) -> float:
        """The whole time."""
        return sum(stage.seconds for stage in self.stages)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        document: dict[str, Any] = to_json(self)
        return {**document, "seconds": self.seconds}

    def blocks(self) -> tuple[Block, ...]:
        """Return what to print: a line a stage, what there is, and the table of matrix groups."""
        matrices = matrices_table(self.findings)
        head = f"{self.model}: about {humanize.size(self.output_bytes)} in {humanize.duration(self.seconds)}"
        notices = "Notices\n" + "\n".join(f"- {humanize.plain(notice)}" for notice in self.notices)
        shown: list[Block] = [head, self._stages(), self.room.text()]
        shown += [matrices] if matrices.rows else []
        return (*shown, notices) if self.notices else tuple(shown)

    def _stages(self) -> Block:
        columns = (
            Column("stage", "name"),
            *(Column(name, "number") for name in ("memory", "GPU", "disk", "time")),
        )
        whole = Estimate(
            "whole run",
            max(stage.memory for stage in self.stages),
            max(stage.gpu for stage in self.stages),
            max(stage.disk for stage in self.stages),
            self.seconds,
            (),
        )
        return make_table(columns, map(_cells, (*self.stages, whole)))


def _cells(stage: Estimate) -> tuple[str, ...]:
    sizes = (
        humanize.size(value) if value else humanize.ABSENT for value in (stage.memory, stage.gpu, stage.disk)
    )
    return (stage.stage, *sizes, humanize.duration(stage.seconds))


def dry_run(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    plan: Plan | None = None,
    target: Target | None = None,
    base: str | Path | None = None,
    run: Run | None = None,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    force: bool = False,
) -> DryRun:
    """Return what `compress` would take: memory, disk and time of each stage; only headers are read.

    What a budget makes of each matrix depends on statistics. `make_plan` decides it, and with that plan it is
    listed here.

    Args:
        model: As in `compress`.
        recipe: As in `compress`.
        plan: As in `compress`.
        target: As in `compress`.
        base: As in `compress`.
        run: As in `compress`.
        out: Where the bundle would go: refused if that place cannot be used. The disk there is tried for a second.
        checkpoint: As in `compress`.
        force: As in `compress`.

    Raises:
        InputError: As `compress` before it begins, memory and disk that will not do included.
    """
    task = open_task(model, recipe, plan, target=target, base=base, run=run)
    source = task.source
    place = Path("bundle" if out is None else out).expanduser().absolute()
    if out is not None:
        check_outputs(source, out, checkpoint, force)
    check_tokenizer(source.folder, source.config.vocab_size)
    needs = run_needs(task)
    there = room(place, needs)
    there.require(task)
    rates = machine_rates(place.parent, task.device, threads=task.threads)
    return DryRun(
        source.title,
        tuple(_estimate(stage, rates) for stage in needs),
        there,
        job_of(task).output_bytes,
        _findings(task),
        (
            *source.notices,
            *task.notices,
            *context_notices(source.description, task.recipe.target.context_length),
        ),
        {kind: rates[kind] for kind in KINDS},
    )


def _estimate(stage: StageNeeds, rates: Any) -> Estimate:
    parts = (*stage.memory, *stage.gpu, *stage.disk)
    return Estimate(
        stage.name, stage.memory_bytes, stage.gpu_bytes, stage.disk_bytes, stage.seconds(rates), parts
    )


def _findings(task: Task) -> tuple[Finding, ...]:
    """Return what is known of the matrices without looking at weights."""
    source, plan = known_plan(task)
    planned = () if plan is None else planned_findings(source, plan)
    return (*source.findings, *planned, *fixed_findings(source.description, task.recipe))

"""What a run needs and what there is: one that cannot end is refused before it begins."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rk_export.calibration.model_statistics import back_tokens, only_diagonals
from rk_export.calibration.self_text import LENGTH, needs_other_writer
from rk_export.calibration.statistics_parts import CACHE_LIMIT
from rk_export.commands.compression_inputs import reads_text, weighs_directions, weighs_errors
from rk_export.commands.stages import Task
from rk_export.device import matmul_dtype
from rk_export.errors import InputError
from rk_export.memory import available_memory
from rk_export.methods.base import Work, methods_of
from rk_export.model.context import own_context
from rk_export.options.ranks import Budget
from rk_export.plan import Plan
from rk_export.planning.job import Job, Writer
from rk_export.planning.method_needs import with_methods
from rk_export.planning.plain_size import plain_int4_bytes
from rk_export.planning.planner import decide_plan
from rk_export.planning.resources import Place, StageNeeds, needed_in
from rk_export.planning.stage_needs import PROCESS_BYTES, stages_of
from rk_export.report.humanize import size
from rk_export.rewrite.sizes import least_bytes, planned_bytes, sized_by_shapes
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.source.protocol import Source
from rk_export.source.transformed import Transformed
from rk_export.tensor_cache import cache_root
from rk_export.work_folder import work_folder_of

_PLACES: tuple[Place, ...] = ("output", "cache")


@dataclass(frozen=True)
class Disk:
    """One file system that a run writes to.

    Args:
        folders: The run's folders on it, by what they are for.
        needed: Bytes that the run has there at its peak.
        free: Bytes that are free.
    """

    folders: dict[str, str]
    needed: int
    free: int


@dataclass(frozen=True)
class Room:
    """What a run needs at its peak, and what there is.

    Args:
        memory: Bytes that are needed beside what the process has already.
        available: Bytes that can be had; None where the system does not tell.
        gpu: Bytes of the device's memory that are needed.
        gpu_free: Bytes that are free there; None without a device.
        disks: The file systems.
    """

    memory: int
    available: int | None
    gpu: int
    gpu_free: int | None
    disks: tuple[Disk, ...]

    def text(self) -> str:
        """Return what is needed beside what is there, a line each."""
        lines = [f"memory  {_beside(self.memory, self.available)}"]
        lines += [f"GPU  {_beside(self.gpu, self.gpu_free)}"] if self.gpu else []
        for disk in self.disks:
            lines.append(f"disk of {', '.join(disk.folders)}  {_beside(disk.needed, disk.free)}")
        return "\n".join(lines)

    def require(self, task: Task) -> None:
        """Refuse what cannot be done here.

        Raises:
            InputError: Says what is needed, what is there, and what would help.
        """
        for name, needed, there in (
            ("memory", self.memory, self.available),
            ("GPU memory", self.gpu, self.gpu_free),
        ):
            if there is not None and needed > there:
                raise InputError(
                    f"the run needs {size(needed)} of {name}, {size(there)} are free",
                    where=task.source.name,
                    fix=_less_memory(task),
                )
        for disk in self.disks:
            if disk.needed > disk.free:
                raise InputError(
                    f"no space left on the disk: {size(disk.needed)} are needed for {' and '.join(disk.folders)}, "
                    f"{size(disk.free)} are free",
                    where=next(iter(disk.folders.values())),
                    fix=_less_disk(disk),
                )


def _beside(needed: int, there: int | None) -> str:
    return f"{size(needed)} needed" + ("" if there is None else f", {size(there)} free")


def _less_memory(task: Task) -> str:
    helps = ["close other programs"]
    if task.recipe.calibration.uses_text and task.recipe.calibration.tokens > 2048:
        helps.append("set calibration.tokens to fewer")
    if task.recipe.methods:
        names = ", ".join(method.name for method in task.recipe.methods)
        helps.append(f"take a recipe without {names}")
    return "; ".join([*helps, "or use a machine with more memory"])


def _less_disk(disk: Disk) -> str:
    helps = ["free some space"]
    if "output" in disk.folders:
        helps.append("give an output on another disk")
    if "cache" in disk.folders:
        helps.append("let RK_EXPORT_CACHE name a folder on another disk, or run `rk-export cache --prune`")
    return "; ".join(helps)


def require_room(task: Task, out: Path) -> None:
    """Refuse a run that will not have enough memory or disk.

    Args:
        task: What is to be done.
        out: The output.

    Raises:
        InputError: As `Room.require`.
    """
    room(out.expanduser().absolute(), run_needs(task)).require(task)


def room(out: Path, needs: Sequence[StageNeeds]) -> Room:
    """Return what a run needs, and what there is.

    Args:
        out: The output, which need not exist.
        needs: What the stages take.
    """
    gpu = max(stage.gpu_bytes for stage in needs)
    free = torch.cuda.mem_get_info()[0] if gpu and torch.cuda.is_available() else None
    # Most of the libraries is loaded already.
    memory = max(0, max(stage.memory_bytes for stage in needs) - PROCESS_BYTES)
    return Room(memory, available_memory(), gpu, free, tuple(_disks(out, needs)))


def _disks(out: Path, needs: Sequence[StageNeeds]) -> list[Disk]:
    """Return the file systems of output and cache; folders on one are summed, stage by stage."""
    folders: dict[Place, Path] = {
        "output": out,
        "cache": cache_root(),
    }
    by_disk: dict[int, list[Place]] = {}
    for place in _PLACES:
        if needed_in(needs, place):
            by_disk.setdefault(_file_system(folders[place]), []).append(place)
    return [
        Disk(
            {place: str(folders[place]) for place in places},
            max(0, max(sum(stage.on(place) for place in places) for stage in needs) - _kept(out, places)),
            shutil.disk_usage(_existing(folders[places[0]])).free,
        )
        for places in by_disk.values()
    ]


def _kept(out: Path, places: Sequence[Place]) -> int:
    """Return the bytes that an unfinished run left, which need not be written again."""
    files = work_folder_of(out).rglob("*") if "output" in places else ()
    return sum(path.stat().st_size for path in files if path.is_file())


def _file_system(folder: Path) -> int:
    """Return a number that is the same for folders on one file system."""
    return os.stat(_existing(folder)).st_dev


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _size_of(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def run_needs(task: Task) -> tuple[StageNeeds, ...]:
    """Return what every stage of a task takes."""
    job = job_of(task)
    return with_methods(job, stages_of(job))


def job_of(task: Task) -> Job:
    """Return a task as numbers; headers of its files are read."""
    source, recipe, device = task.source, task.recipe, task.device
    weighs = weighs_errors(recipe)
    has_text = reads_text(source, recipe)
    length = min(LENGTH, own_context(source.config))
    sequences = 0
    if has_text:
        is_written = recipe.calibration.metric == "self"
        sequences = (
            -(-recipe.calibration.tokens // length) if is_written else recipe.calibration.tokens // length
        )
    has_statistics = weighs and has_text
    directions = has_statistics and weighs_directions(source, recipe)
    tokens = sequences * length
    wanted = has_statistics and recipe.weighs_outputs and recipe.calibration.gradients
    return Job(
        source.description,
        recipe,
        parameters=source.parameter_count(),
        stored_bytes=source.stored_bytes(),
        is_mapped=source.is_mapped,
        length=length,
        sequences=sequences,
        writer=_writer(task, has_text),
        has_statistics=has_statistics,
        directions=directions and wanted and not only_diagonals(source, recipe),
        back=min(tokens, back_tokens(tokens, directions=directions) // length * length or length)
        if wanted
        else 0,
        prepares=has_text and recipe.prepared_for is not None and not source.architecture.is_encoder,
        int4_bytes=plain_int4_bytes(source, recipe),
        output_bytes=_output_bytes(task),
        limit=CACHE_LIMIT,
        product_bytes=matmul_dtype(device).itemsize,
        tokenizer_bytes=_size_of(source.folder / TOKENIZER_FILE),
        on_gpu=device.type == "cuda",
    )


def _writer(task: Task, has_text: bool) -> Writer:
    drawn = task.source.architecture.is_encoder
    if drawn or not has_text or task.recipe.calibration.metric != "self":
        return "nobody"
    return "int4" if needs_other_writer(task.source, task.device) else "dense"


def known_plan(task: Task) -> tuple[Source, Plan | None]:
    """Return the plan that is given, or the one that shapes alone make, with the model that it is for."""
    source, plan = Transformed(task.source), task.plan
    if plan is None:
        return source, decide_plan(source, task.recipe) if sized_by_shapes(task.recipe) else None
    for method in methods_of(task.recipe) if plan.pruning is not None else ():
        if method.options.stage == "prune":
            source = method.transform(Work(source, task.recipe, task.device, pruning=plan.pruning))
    return source, plan


def _output_bytes(task: Task) -> int:
    """Return the bytes of the bundle's model files as far as they are known: at most those of plain INT4 elsewhere."""
    source, recipe = task.source, task.recipe
    left, plan = known_plan(task)
    if plan is not None:
        return planned_bytes(left, plan)
    limit: Budget | None = recipe.limit
    if limit is not None and limit.kind == "size":
        return round(limit.amount)
    weights = sum(matrix.shape[0] * matrix.shape[1] for matrix in source.description.matrices)
    rest = least_bytes(source, recipe)
    if limit is not None and limit.kind == "mean_bits":
        return rest + round(limit.amount / 8 * weights)
    share = limit.amount if limit is not None and limit.kind == "keep" else 1.0
    floats = 4 if recipe.target.float_dtype == "fp32" else 2
    bits = recipe.quant.bits / 8 + 2 / max(recipe.quant.block_size, 1) if recipe.quant is not None else floats
    return rest + round(share * bits * weights)

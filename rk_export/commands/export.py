"""A compressed checkpoint, or a dense model as it is, as a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rk_export.bundle.check_ends import check_ends
from rk_export.bundle.write import BundleRequest, Stages, write_bundle
from rk_export.commands.compress import compress
from rk_export.errors import InputError
from rk_export.folders import AtomicFolder, check_replaceable
from rk_export.model.context import check_context
from rk_export.model.description import describe
from rk_export.model.switches import switches_of
from rk_export.model.torch_logits import torch_logits
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.options.target import GraphTarget, Target
from rk_export.parity.probe import make_probe
from rk_export.planning.stored_bytes import FLOAT_BYTES
from rk_export.report.records import Report
from rk_export.rewrite.apply import QUANTIZED, Rewritten
from rk_export.rewrite.checkpoint import is_checkpoint, load_pretrained
from rk_export.rewrite.sizes import model_bytes
from rk_export.scratch import laid_down
from rk_export.source.stored import read_config


def export(
    model: str | Path,
    out: str | Path,
    *,
    ep: GraphTarget | None = None,
    context_length: int | None = None,
    base: str | Path | None = None,
    run: Run | None = None,
    force: bool = False,
    command: str = "",
) -> Report:
    """Export a compressed checkpoint as it is, or a dense model without compressing it.

    Args:
        model: A checkpoint folder that rk-export saved, or a dense model.
        out: Bundle folder.
        ep: The execution provider of a dense model's graph; a checkpoint holds its own.
        context_length: As in `Target`; for a checkpoint too.
        base: As in `compress`.
        run: As in `compress`.
        force: Replace an existing output.
        command: Command line to note in the report.

    Raises:
        RkExportError: As `compress`.
    """
    folder = Path(model).expanduser()
    if not (folder.is_dir() and is_checkpoint(folder)):
        target = Target(ep=ep or "cpu", context_length=context_length)
        return compress(model, out, Recipe(target=target), base=base, run=run, force=force, command=command)
    if base is not None:
        raise InputError("goes with a LoRA adapter, and this is a checkpoint", where="--base", fix="drop it")
    if ep is not None:
        raise InputError("a checkpoint holds its own execution provider", where="--ep", fix="drop it")
    check_context(describe(read_config(folder)), context_length)
    check_replaceable(Path(out).expanduser(), force, inputs=[folder])
    threads = None if run is None else run.threads
    request = BundleRequest(threads=threads, command=command)
    stages = Stages()
    with stages.stage("load", f"opening {model}"):
        rewritten = _with_context(load_pretrained(folder), context_length)
        if not rewritten.architecture.is_encoder:
            check_ends(folder, rewritten.model.config)
    needed = model_bytes(rewritten.model, FLOAT_BYTES[rewritten.plan.recipe.target.float_dtype])
    with AtomicFolder(out, force=force, needed=needed) as partial:
        config = rewritten.model.config
        probe = make_probe(folder, config.vocab_size, switches_of(rewritten.description))
        logits = laid_down(torch_logits(rewritten.model)(probe.batch))
        rewritten = replace(rewritten, probe_logits={QUANTIZED: logits})
        name = Path(out).name
        return write_bundle(partial, rewritten, folder, request, stages, name=name, probe=probe)


def _with_context(rewritten: Rewritten, context_length: int | None) -> Rewritten:
    """Return a checkpoint's model with a context of its own in its plan; None leaves the plan's."""
    if context_length is None:
        return rewritten
    plan = rewritten.plan
    target = replace(plan.recipe.target, context_length=context_length)
    changed = replace(plan, recipe=replace(plan.recipe, target=target))
    return replace(rewritten, plan=changed)

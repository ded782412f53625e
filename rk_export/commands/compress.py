"""From a model to a verified bundle: open, check, calibrate, plan, rewrite, recover, write, a named stage each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rk_export.bundle.write import BundleRequest, Stages, write_bundle
from rk_export.commands.compression_inputs import CompressionInputs
from rk_export.commands.requirements import require_room
from rk_export.commands.stages import Task, check_outputs, open_task
from rk_export.folders import AtomicFolder
from rk_export.model.torch_logits import torch_logits
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.options.target import Target
from rk_export.parity.probe import Probe
from rk_export.plan import Plan
from rk_export.report.records import Report
from rk_export.rewrite.apply import QUANTIZED, Rewritten
from rk_export.rewrite.checkpoint import save_pretrained
from rk_export.rewrite.layer_store import LayerStore
from rk_export.rewrite.sizes import planned_bytes
from rk_export.scratch import laid_down
from rk_export.work_folder import WorkFolder


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    plan: Plan | None = None,
    target: Target | None = None,
    base: str | Path | None = None,
    run: Run | None = None,
    checkpoint: str | Path | None = None,
    force: bool = False,
    resume: bool = True,
    command: str = "",
) -> Report:
    """Compress a model and write a verified ONNX bundle.

    Args:
        model: HF folder, hub id, GGUF file or LoRA adapter.
        out: Bundle folder; written beside its place and moved in once everything passed.
        recipe: What to do; None takes the preset `default`: the best model of the size that plain INT4 takes.
        plan: A plan made earlier, instead of a recipe.
        target: Where the bundle will run; None takes what the recipe says.
        base: Of a LoRA adapter, the model that it is merged into; None takes the one that the adapter names.
        run: The machine; None takes what is there.
        checkpoint: Also save the compressed PyTorch model there.
        force: Replace an existing output.
        resume: Go on with an unfinished run of the same output, which lies beside it; the result is the same.
        command: Command line to note in the report.

    Raises:
        InputError: If the model, an option, the plan or the output cannot be used, or memory or disk will not do.
        UnsupportedModelError: If the family cannot be exported exactly.
        ProviderError: If CUDA was asked for and is absent.
        FusionError: If a planned graph pattern is missing.
        ParityError: If ONNX Runtime does not compute what PyTorch computes; no bundle is left.
    """
    threads = None if run is None else run.threads
    request = BundleRequest(threads=threads, command=command)
    place, stages = Path(out), Stages()
    with stages.stage("load", f"opening {model}"):
        task = open_task(model, recipe, plan, target=target, base=base, run=run)
        check_outputs(task.source, out, checkpoint, force)
        require_room(task, place)
    with WorkFolder(place, resume=resume) as work:
        work.begin(task.identity())
        with stages.stage("check", "comparing with transformers"):
            before = task.preflight()
        probe = torch.from_numpy(before.probe.batch)
        with stages.stage("calibrate", f"metric {task.recipe.calibration.metric}"):
            inputs = task.inputs(work, probe)
        with stages.stage("plan", "choosing ranks and bits"):
            plan = _decided(task, inputs, work)
            needed = planned_bytes(inputs.source, plan)
        with AtomicFolder(out, force=force, needed=needed) as partial:
            with stages.stage("rewrite", "factorizing and quantizing layer by layer"):
                rewritten = inputs.rewrite(plan, probe, LayerStore(work.layers), run)
            rewritten = _recovered(rewritten, inputs, before.probe, work, stages)
            if checkpoint is not None:
                folder = task.source.folder
                save_pretrained(rewritten, Path(checkpoint), tokenizer_from=folder, force=force)
            return write_bundle(
                *(partial, rewritten, task.source, request, stages),
                name=place.name,
                probe=before.probe,
                before=before,
            )


def _decided(task: Task, inputs: CompressionInputs, work: WorkFolder) -> Plan:
    """Return the plan that the unfinished run had decided on, or the one that is decided now and kept for it."""
    if work.plan.is_file():
        return Plan.load(work.plan)
    plan = task.decided(inputs)
    plan.save(work.plan)
    return plan


def _recovered(
    rewritten: Rewritten, inputs: CompressionInputs, probe: Probe, work: WorkFolder | None, stages: Stages
) -> Rewritten:
    """Return the rewritten model after the methods that recover it, a stage each; no state is kept without `work`."""
    for method in inputs.methods:
        if method.options.stage != "recover":
            continue
        with stages.stage(method.options.name, method.doing):
            state = None if work is None else work.state(method.options.name)
            rewritten = method.recover(rewritten, inputs.teacher, replace(inputs.work, state=state))
            logits = {
                **rewritten.probe_logits,
                QUANTIZED: laid_down(torch_logits(rewritten.model)(probe.batch)),
            }
            rewritten = replace(rewritten, probe_logits=logits)
    return rewritten


def rewrite_model(
    model: str | Path,
    recipe: Recipe | None = None,
    *,
    plan: Plan | None = None,
    target: Target | None = None,
    base: str | Path | None = None,
    run: Run | None = None,
) -> Rewritten:
    """Return the compressed PyTorch model that `compress` would export; nothing is exported or written.

    Args:
        model: As in `compress`.
        recipe: As in `compress`.
        plan: As in `compress`.
        target: As in `compress`.
        base: As in `compress`.
        run: As in `compress`.

    Raises:
        RkExportError: As `compress`, parity of an exported graph apart.
    """
    task = open_task(model, recipe, plan, target=target, base=base, run=run)
    before = task.preflight()
    inputs = task.inputs()
    rewritten = inputs.rewrite(task.decided(inputs))
    return _recovered(rewritten, inputs, before.probe, None, Stages())

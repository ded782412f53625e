"""What methods take beside the stages that every run has: they hold the whole model, and run text through it."""

from __future__ import annotations

from dataclasses import replace

from rk_export.options.step import MethodOptions
from rk_export.planning.job import Job
from rk_export.planning.resources import StageNeeds, Term, Work, added, total
from rk_export.planning.stage_needs import BACK_CHUNK, LOGITS, PROCESS_BYTES

# Passes of the text through the model for each training step: student forward and back, its recomputation, teacher.
_PASSES_OF_STEP = 5
# Steps of a method that says no number, and tokens of one that says none.
_STEPS, _TOKENS = 8, 1024
# The model in float32, gradients of what is trained, and two moments of the optimizer over a part of it.
_COPIES = 2


def with_methods(job: Job, stages: tuple[StageNeeds, ...]) -> tuple[StageNeeds, ...]:
    """Return stages with what the recipe's methods take; one that recovers has a stage of its own after the rewrite.

    Args:
        job: The run.
        stages: What it takes without methods.
    """
    result: list[StageNeeds] = []
    for stage in stages:
        before = [method for method in job.recipe.methods if method.stage != "recover"]
        for method in before if stage.name == "calibrate" else ():
            largest = max(stage.memory, _memory(job, method), key=total)
            stage = replace(stage, memory=largest, work=added(stage.work, _work(job, method)))
        result.append(stage)
        if stage.name == "rewrite":
            result += [
                StageNeeds(method.name, _memory(job, method), stage.gpu, stage.disk, _work(job, method))
                for method in job.recipe.methods
                if method.stage == "recover"
            ]
    return tuple(result)


def _memory(job: Job, method: MethodOptions) -> tuple[Term, ...]:
    wide = max(layer.parameters for layer in job.layers)
    return (
        Term("process and libraries", PROCESS_BYTES),
        Term(f"the model that {method.name} works on", 4 * _COPIES * job.parameters),
        Term("activations of its text", 4 * BACK_CHUNK * len(job.layers) * 8 * job.width),
        Term("logits of some tokens", 12 * LOGITS),
        Term("a layer and its gradients", 8 * wide),
    )


def _work(job: Job, method: MethodOptions) -> Work:
    steps = int(getattr(method, "steps", 0) or _STEPS) + int(getattr(method, "tune", 0))
    each = int(getattr(method, "iterations", 1))
    tokens = float(steps * each * int(getattr(method, "batch_tokens", _TOKENS)))
    return {
        "products": 2.0 * _PASSES_OF_STEP * tokens * (job.active_parameters + job.table),
        "passes": 8.0 * steps * job.parameters + 32.0 * tokens * job.vocabulary,
        "calls": 400.0 * steps * each * len(job.layers),
    }

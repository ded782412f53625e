"""A bundle's files and parity, measured again: alone, or against the model that it was made from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from rk_export.bundle.write import sentence_head
from rk_export.commands.preparations import prepared_source
from rk_export.commands.stages import Task, open_task
from rk_export.errors import InputError
from rk_export.json_codec import from_json
from rk_export.manifest import MANIFEST, check_manifest
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.parity.greedy import Golden
from rk_export.parity.preflight import Preflight, dense_logits
from rk_export.parity.tiers import bundle_tiers, method_tiers, prepared_tier, runtime_tiers, unrepeated_tiers
from rk_export.plan import Plan
from rk_export.report.records import ParityTier
from rk_export.rewrite.accuracy_levels import choose_levels
from rk_export.runtime.providers import Provider
from rk_export.signature import check_signature
from rk_export.source.transformed import Transformed


def verify(
    bundle: str | Path,
    against: str | Path | None = None,
    *,
    key: str | Path | None = None,
    base: str | Path | None = None,
    provider: Provider = "auto",
    run: Run | None = None,
) -> tuple[ParityTier, ...]:
    """Check a bundle's files and its parity.

    Args:
        bundle: The bundle folder.
        against: The dense model it was made from: the bundle's plan is applied to it again and every tier is
            measured. None measures what the bundle can show alone: tiers d to h. Where the plan's calibration text
            is not at hand, the tiers that its statistics decide are said to be not measured, and the others run.
        key: File of a public key; the signature of the manifest is checked before anything else.
        base: Of `against`, as in `compress`.
        provider: Execution provider.
        run: The machine; its `texts` may hold the calibration text.

    Returns:
        The tiers; a failed one has `passed` False.

    Raises:
        InputError: If the signature is missing or wrong, a file of the bundle is missing or corrupted, or the model is
            not the bundle's.
    """
    folder, threads = Path(bundle), None if run is None else run.threads
    if key is not None:
        check_signature(folder, key)
    plan, golden = bundle_files(folder)
    if against is None:
        _refuse_without_model(base, run or Run())
        return _alone(folder, golden, plan, provider, threads)
    _check_repeatable(folder, plan.recipe)
    task = open_task(against, None, plan, base=base, run=run, needs_texts=False)
    before = task.preflight()
    text = task.recipe.missing_text
    if text is not None:
        why = f"the calibration text {text.name} is not at hand, name it with --calibration-text"
        alone = _alone(folder, golden, plan, provider, threads)
        return (*_without_statistics(task, before, why), *alone)
    batch = torch.from_numpy(before.probe.batch)
    rewritten = choose_levels(task.inputs(probe=batch).rewrite(plan, batch), batch)
    head = sentence_head(rewritten, task.source.folder)
    tiers, _ = runtime_tiers(folder, rewritten, before.probe, head=head, provider=provider, threads=threads)
    return (*method_tiers(rewritten, before), *tiers)


def bundle_files(folder: Path) -> tuple[Plan, Golden | None]:
    """Check every file of a bundle against its manifest; return the plan and, of a decoder, its confirmed tokens.

    Raises:
        InputError: A file is missing or corrupted, or the plan or the manifest cannot be read.
    """
    stored = check_manifest(folder).get("golden")
    where = f"{folder / MANIFEST}: golden"
    golden = None if stored is None else from_json(Golden, stored, where, fix="export the bundle again")
    return Plan.load(folder / "plan.json"), golden


def _refuse_without_model(base: str | Path | None, run: Run) -> None:
    """Refuse what only a comparison with the dense model reads."""
    given = {
        "--base": base is not None,
        "--device": run.device != Run.device,
        "--calibration-text": bool(run.texts),
    }
    for option, is_given in given.items():
        if is_given:
            raise InputError("goes with --against", where=option, fix="give --against MODEL, or drop it")


def _without_statistics(task: Task, before: Preflight, why: str) -> Iterator[ParityTier]:
    """Yield tiers 0 to c as far as they need no statistics, and say why the others are not measured."""
    yield before.tier
    names = task.recipe.preparations
    if "scale" not in names:  # its peaks are those of the text
        prepared = prepared_source(Transformed(task.source), task.recipe, None, task.device)
        logits, _ = dense_logits(prepared, torch.from_numpy(before.probe.batch))
        yield prepared_tier(before, logits.numpy(), names)
    yield from unrepeated_tiers("pabc" if "scale" in names else "abc", why)


def _alone(
    folder: Path, golden: Golden | None, plan: Plan, provider: Provider, threads: int | None
) -> tuple[ParityTier, ...]:
    """Return the tiers that a decoder bundle shows without its model."""
    if golden is None:
        raise InputError(
            "an encoder bundle can only be verified against its model",
            where=str(folder),
            fix="give --against MODEL",
        )
    return bundle_tiers(folder, golden, plan.recipe.target.float_dtype, provider=provider, threads=threads)


def _check_repeatable(folder: Path, recipe: Recipe) -> None:
    """Refuse bundles that a training made: a plan does not hold what it found."""
    for method in recipe.methods:
        if method.trained:
            raise InputError(
                f"a bundle that {method.trained} cannot be made again from its dense model and its plan",
                where=str(folder),
                fix="verify it without --against; its report holds the tiers against the dense model",
            )

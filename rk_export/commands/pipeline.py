"""From a model to a verified bundle: load, plan, rewrite, export, verify, bundle, a named stage each."""

from __future__ import annotations

from dataclasses import replace
from os import cpu_count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from rk_export.bundle.check_ends import check_ends
from rk_export.bundle.write import BundleRequest, Stages, new_report, write_bundle
from rk_export.calibration.neuron_peaks import SHORT_TEXT, neuron_peaks
from rk_export.calibration.streamed_moments import calibration_tokens
from rk_export.commands.checks import check_options
from rk_export.device import resolve_device
from rk_export.errors import InputError
from rk_export.evaluation.measure import EvalText, SpeedTest, check_text, context_length, perplexity_of
from rk_export.evaluation.models import open_candidate
from rk_export.evaluation.perplexity import PerplexityResult
from rk_export.folders import AtomicFolder, check_free_space, check_manifest, check_replaceable
from rk_export.graph.dense.frontend import check_supported
from rk_export.methods.plans import basis_plan, sparse_plan
from rk_export.model.context import check_context, context_notices
from rk_export.model.sites import canonical_layers
from rk_export.model.switches import switches_of
from rk_export.model.torch_logits import torch_logits
from rk_export.options.compress import CalibrationOptions, CompressOptions
from rk_export.parity.comparison import require_parity
from rk_export.parity.greedy import Golden
from rk_export.parity.preflight import dense_logits, preflight
from rk_export.parity.probe import Probe, make_probe
from rk_export.parity.tiers import bundle_tiers, method_tiers, prepared_tier, runtime_tiers
from rk_export.plan import Plan, SitePlan
from rk_export.planning import planner
from rk_export.planning.cost_table import DECODED, TOKENS, CostTable, Phase, measure_costs
from rk_export.planning.currencies import TIMED_FORMATS
from rk_export.planning.fixed_parts import fixed_findings
from rk_export.planning.stored_bytes import FLOAT_BYTES
from rk_export.report.records import Finding, Outcome, ParityTier, Report
from rk_export.rewrite.accuracy_levels import choose_levels
from rk_export.rewrite.apply import QUANTIZED, Rewritten
from rk_export.rewrite.changes import SCALE_ALPHA
from rk_export.rewrite.checkpoint import is_checkpoint, load_pretrained, save_pretrained
from rk_export.rewrite.groundwork import Groundwork, groundwork
from rk_export.rewrite.heal import HealOptions, heal
from rk_export.rewrite.sizes import least_bytes, model_bytes, planned_bytes, planned_findings
from rk_export.runtime import bench
from rk_export.runtime.providers import Provider
from rk_export.source.prepared import PreparedSource, save_prepared
from rk_export.source.stored import ModelSource, open_source, read_config


def make_plan(
    model: str | Path,
    options: CompressOptions | None = None,
    *,
    base: str | Path | None = None,
    threads: int | None = None,
) -> Plan:
    """Return the plan that `compress` would apply; `base` as there.

    Raises:
        InputError: If the model or an option cannot be used.
        UnsupportedModelError: If the family cannot be exported exactly.
    """
    source = open_source(model, base)
    options = _checked_options(source, options, None)
    preflight(source, options)
    return _plan(groundwork(source, options), threads)


def _plan(ground: Groundwork, threads: int | None) -> Plan:
    return replace(_decided(ground, threads), pruning=ground.source.pruning)


def _decided(ground: Groundwork, threads: int | None) -> Plan:
    if ground.selection is not None:
        return basis_plan(ground.source, ground.options, ground.selection.ranks)
    if ground.parts is not None:
        return sparse_plan(ground.source, ground.options, ground.parts)
    costs = None
    if (budget := ground.options.budget) is not None and budget.kind == "speed_up":
        costs = model_costs(ground.source, budget.phase, threads)
    return planner.make_plan(
        ground.source, ground.options, statistics=ground.statistics, table=ground.table, costs=costs
    )


def model_costs(source: ModelSource, phase: Phase, threads: int | None) -> CostTable:
    """Measure the time of a dense model in floats and of its matrix products in every format.

    Args:
        source: The dense model; it is exported to a temporary folder.
        phase: `prefill` or `decode`.
        threads: Threads of ONNX Runtime; None takes all cores.
    """
    shapes = [
        (linear.out_features, linear.in_features)
        for layer in canonical_layers(source.config)
        for item in source.architecture.projections(source.config, layer.index)
        for linear in [layer.linear(item.path)]
    ]
    table = measure_costs(shapes, TIMED_FORMATS, phase, threads=threads)
    with TemporaryDirectory() as folder:
        model, base = source.origin
        export(model, Path(folder) / "dense", base=base, threads=threads)
        result = bench(
            [Path(folder) / "dense"],
            prompt_tokens=TOKENS["prefill"],
            new_tokens=DECODED,
            threads=threads or cpu_count() or 1,
        ).rows[0]
    speed = result.prefill_median if phase == "prefill" else result.decode_median
    products = sum(table.price(rows, columns, None) for rows, columns in shapes)
    return replace(table, rest=max(0.0, 1e3 * TOKENS[phase] / speed - products))


def rewrite_model(
    model: str | Path,
    options: CompressOptions | None = None,
    *,
    plan: Plan | None = None,
    base: str | Path | None = None,
    threads: int | None = None,
    state: Path | None = None,
) -> Rewritten:
    """Return the compressed PyTorch model that `compress` would export; nothing is exported or written.

    Args:
        model: As in `compress`.
        options: As in `compress`.
        plan: As in `compress`.
        base: As in `compress`.
        threads: Threads of ONNX Runtime, for a budget of time.
        state: Where a training keeps its state, to go on after an interruption; None keeps none.

    Raises:
        RkExportError: As `compress`.
    """
    source = open_source(model, base)
    options = _checked_options(source, options, plan)
    before = preflight(source, options)
    ground = groundwork(source, options, pruning=None if plan is None else plan.pruning, state=state)
    rewritten = ground.rewrite(plan or _plan(ground, threads))
    return _healed(rewritten, ground, before.probe, state) if options.heal else rewritten


def dry_run(
    model: str | Path,
    options: CompressOptions | None = None,
    *,
    plan: Plan | None = None,
    base: str | Path | None = None,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    force: bool = False,
) -> Report:
    """Return what `compress` would do, with sizes from shapes alone; nothing is written.

    Args:
        model: As in `compress`.
        options: As in `compress`.
        plan: As in `compress`.
        base: As in `compress`.
        out: Where the bundle would go: refused if it will not fit there, or that place cannot be used.
        checkpoint: As in `compress`.
        force: As in `compress`.

    Raises:
        InputError: As `compress`.
        ParityError: As `compress`, before any work.
    """
    source = open_source(model, base)
    options = _checked_options(source, options, plan)
    if out is not None:
        _check_outputs(source, out, checkpoint, force)
        check_free_space(out, _least_bytes(source, options, plan))
    before = preflight(source, options)
    ground = groundwork(source, options, pruning=None if plan is None else plan.pruning)
    plan = plan or _plan(ground, None)
    if out is not None:
        check_free_space(out, planned_bytes(ground.source, plan))
    fixed = fixed_findings(ground.source.config, plan.options)
    findings = (*ground.findings, *planned_findings(ground.source, plan), *fixed)
    notices = (*source.notices, *before.notices, *context_notices(source.config, options.context_length))
    return new_report(
        source.title, source.config.model_type, findings=findings, parity=(before.tier,), notices=notices
    )


def _check_outputs(
    source: ModelSource, out: str | Path, checkpoint: str | Path | None = None, force: bool = False
) -> None:
    """Refuse outputs that cannot be written, or would take the place of the model or of each other."""
    target = Path(out).expanduser()
    check_replaceable(target, force, inputs=source.places)
    if checkpoint is not None:
        check_replaceable(Path(checkpoint), force, inputs=[*source.places, target])


def _least_bytes(source: ModelSource, options: CompressOptions, plan: Plan | None) -> int:
    """Return what a run will write at least, as far as that is known before it."""
    if plan is not None and plan.pruning is None:
        return planned_bytes(source, plan)
    return least_bytes(source, options)


def _checked_options(
    source: ModelSource, options: CompressOptions | None, plan: Plan | None
) -> CompressOptions:
    """Return the options of a run, or refuse them before any work."""
    if plan is not None and options is not None:
        raise InputError(
            "a plan already holds the options", where="--plan", fix="drop the other compression options"
        )
    if plan is not None:
        planner.check_plan(source, plan)
        options = plan.options
    options = options or CompressOptions()
    check_supported(source.config, ep=options.ep, dtype=options.float_dtype)
    check_options(source, options)
    if not source.architecture.is_encoder:
        check_ends(source.folder, source.config, source.origin[1])
    resolve_device(options.device)
    return options


def compress(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    plan: Plan | None = None,
    base: str | Path | None = None,
    text: EvalText | None = None,
    speed: SpeedTest | None = None,
    checkpoint: str | Path | None = None,
    triton: str | None = None,
    threads: int | None = None,
    force: bool = False,
    command: str = "",
) -> Report:
    """Compress a model and write a verified ONNX bundle.

    Args:
        model: HF folder, hub id, GGUF file or LoRA adapter.
        out: Bundle folder; written beside its place and moved in once everything passed.
        options: What to do; the defaults quantize to INT4 under statistics of self-written text.
        plan: A plan made earlier, instead of options.
        base: Of a LoRA adapter, the model that it is merged into; None takes the one that the adapter names.
        text: Also measure the perplexity of the dense and of the compressed model on it.
        speed: Also measure the bundle's tokens per second.
        checkpoint: Also save the compressed PyTorch model there.
        triton: Also add a Triton model repository of this name.
        threads: Threads of ONNX Runtime while verifying; None lets it decide.
        force: Replace an existing output.
        command: Command line to note in the report.

    Raises:
        InputError: If the model, an option, the plan or the output cannot be used.
        UnsupportedModelError: If the family cannot be exported exactly.
        ProviderError: If CUDA was asked for and is absent.
        FusionError: If a planned graph pattern is missing.
        ParityError: If ONNX Runtime does not compute what PyTorch computes; no bundle is left.
    """
    request = BundleRequest(text=text, speed=speed, triton=triton, threads=threads, command=command)
    stages = Stages()
    with stages.stage("load", f"opening {model}"):
        source = open_source(model, base)
        options = _checked_options(source, options, plan)
        _check_outputs(source, out, checkpoint, force)
        check_free_space(out, _least_bytes(source, options, plan))
        if speed is not None:
            speed = speed.within(context_length(source.config, "--speed"))
            request = replace(request, speed=speed)
        if text is not None:
            rows = int(source.config.vocab_size)
            longest = context_length(source.config, "--text", options.context_length)
            check_text(text, source.folder, longest, rows)
    with stages.stage("check", "comparing with transformers"):
        before = preflight(source, options)
    with stages.stage("calibrate", f"metric {options.calibration.metric}"):
        training = _state(Path(out), "basel")
        ground = groundwork(source, options, pruning=None if plan is None else plan.pruning, state=training)
    with stages.stage("plan", "choosing ranks and bits"):
        plan = plan or _plan(ground, threads)
        needed = planned_bytes(ground.source, plan)
    with AtomicFolder(out, force=force, needed=needed) as partial:
        probe = before.probe
        with stages.stage("rewrite", "factorizing and quantizing layer by layer"):
            rewritten = ground.rewrite(plan, torch.from_numpy(probe.batch))
        if options.heal:
            with stages.stage("heal", f"{options.heal} steps towards the dense model"):
                rewritten = _healed(rewritten, ground, probe, _state(Path(out), "heal"))
        if checkpoint is not None:
            save_pretrained(rewritten, Path(checkpoint), tokenizer_from=source.folder, force=force)
        name = Path(out).name
        report = write_bundle(
            partial, rewritten, source, request, stages, name=name, probe=probe, before=before
        )
    for stage in ("basel", "heal"):
        _state(Path(out), stage).unlink(missing_ok=True)
    return report


def _state(out: Path, stage: str) -> Path:
    """Return where an interrupted training waits for the next run: beside the output."""
    return out.with_name(f".{out.name}.{stage}")


def _healed(rewritten: Rewritten, ground: Groundwork, probe: Probe, state: Path | None) -> Rewritten:
    """Train a compressed model; its state stays until the bundle is in place, so a failed export loses nothing."""
    options = HealOptions(steps=ground.options.heal, seed=ground.options.calibration.seed)
    wanted = options.steps * options.batch_tokens
    tokens = calibration_tokens(
        ground.source,
        replace(ground.options.calibration, tokens=wanted),
        resolve_device(ground.options.device),
    )
    # What the model was tuned to do is to be recovered too; what was pruned away is to be made up for.
    teacher = ground.dense if ground.selection is None else ground.source
    result = heal(rewritten, teacher, tokens, options, state=state)
    logits = {**rewritten.probe_logits, QUANTIZED: torch_logits(rewritten.model)(probe.batch)}
    return replace(rewritten, findings=(*rewritten.findings, result.finding), probe_logits=logits)


def export(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    base: str | Path | None = None,
    context_length: int | None = None,
    triton: str | None = None,
    threads: int | None = None,
    force: bool = False,
    command: str = "",
) -> Report:
    """Export a compressed checkpoint as it is, or a dense model without compressing it.

    Args:
        model: A checkpoint folder that rk-export saved, or a dense model.
        out: Bundle folder.
        options: For a dense model, its execution provider and device; a checkpoint carries its own.
        base: As in `compress`.
        context_length: As in `CompressOptions`; for a checkpoint too.
        triton: As in `compress`.
        threads: As in `compress`.
        force: Replace an existing output.
        command: Command line to note in the report.

    Raises:
        RkExportError: As `compress`.
    """
    folder = Path(model).expanduser()
    if not (folder.is_dir() and is_checkpoint(folder)):
        dense = replace(options or CompressOptions(), groups=(), qk="whole", quant=None, embedding_quant=None)
        if context_length is not None:
            dense = replace(dense, context_length=context_length)
        return compress(
            model, out, dense, base=base, triton=triton, threads=threads, force=force, command=command
        )
    if base is not None:
        raise InputError("goes with a LoRA adapter, and this is a checkpoint", where="--base", fix="drop it")
    if options is not None:
        raise InputError(
            "a checkpoint carries its own options", where=str(model), fix="drop the other options"
        )
    check_context(read_config(folder), context_length)
    check_replaceable(Path(out).expanduser(), force, inputs=[folder])
    request = BundleRequest(triton=triton, threads=threads, command=command)
    stages = Stages()
    with stages.stage("load", f"opening {model}"):
        rewritten = _with_context(load_pretrained(folder), context_length)
        if not rewritten.architecture.is_encoder:
            check_ends(folder, rewritten.model.config)
    needed = model_bytes(rewritten.model, FLOAT_BYTES[rewritten.plan.options.float_dtype])
    with AtomicFolder(out, force=force, needed=needed) as partial:
        config = rewritten.model.config
        probe = make_probe(folder, config.vocab_size, switches_of(config))
        logits = torch_logits(rewritten.model)(probe.batch)
        rewritten = replace(rewritten, probe_logits={QUANTIZED: logits})
        name = Path(out).name
        return write_bundle(partial, rewritten, folder, request, stages, name=name, probe=probe)


def _with_context(rewritten: Rewritten, context_length: int | None) -> Rewritten:
    """Return a checkpoint's model with a context of its own in its plan; None leaves the plan's."""
    if context_length is None:
        return rewritten
    plan = rewritten.plan
    changed = replace(plan, options=replace(plan.options, context_length=context_length))
    return replace(rewritten, plan=changed)


def verify(
    bundle: str | Path,
    against: str | Path | None = None,
    *,
    base: str | Path | None = None,
    provider: Provider = "auto",
    threads: int | None = None,
) -> tuple[ParityTier, ...]:
    """Check a bundle's files and its parity.

    Args:
        bundle: The bundle folder.
        against: The dense model it was made from: the bundle's plan is applied to it again and every tier is
            measured. None measures what the bundle can show alone: tiers d to h.
        base: Of `against`, as in `compress`.
        provider: Execution provider.
        threads: Threads of ONNX Runtime.

    Returns:
        The tiers; a failed one has `passed` False.

    Raises:
        InputError: If a file of the bundle is missing or corrupted, or the model is not the bundle's.
    """
    folder = Path(bundle)
    manifest = check_manifest(folder)
    plan = Plan.load(folder / "plan.json")
    if against is None:
        if base is not None:
            raise InputError("goes with --against", where="--base", fix="give --against ADAPTER, or drop it")
        if manifest["golden"] is None:
            raise InputError(
                "an encoder bundle can only be verified against its model",
                where=str(folder),
                fix="give --against MODEL",
            )
        golden = Golden.from_json(manifest["golden"])
        return bundle_tiers(folder, golden, plan.options.float_dtype, provider=provider, threads=threads)
    if plan.options.heal or plan.options.basel:
        trained = "healed bundle" if plan.options.heal else "bundle that was trained for a task"
        raise InputError(
            f"a {trained} cannot be made again from its dense model and its plan",
            where=str(folder),
            fix="verify it without --against; its report holds the tiers against the dense model",
        )
    source = open_source(against, base)
    before = preflight(source, plan.options)
    ground = groundwork(source, plan.options, pruning=plan.pruning)
    rewritten = ground.rewrite(plan, torch.from_numpy(before.probe.batch))
    rewritten = choose_levels(rewritten, torch.from_numpy(before.probe.batch))
    tiers, _ = runtime_tiers(folder, rewritten, before.probe, provider=provider, threads=threads)
    return (*method_tiers(rewritten, before), *tiers)


def prepare(
    model: str | Path,
    out: str | Path,
    names: tuple[str, ...] = ("fold", "rotate-heads", "scale"),
    *,
    base: str | Path | None = None,
    seed: int = 0,
    force: bool = False,
) -> tuple[Finding, ...]:
    """Write a model whose weights are exactly reparameterized: a plain HF folder with the same logits.

    Args:
        model: HF folder, hub id or GGUF file.
        out: Folder to write; `rotate` unties a tied embedding there.
        names: Names from `rk_export.options.compress.PREPARATIONS`.
        base: As in `compress`.
        seed: Of the rotations, and of the text whose peaks `scale` evens out.
        force: Replace an existing output.

    Raises:
        InputError: If the model, a name or the output cannot be used.
        ParityError: If the prepared model computes other logits; nothing is written.
    """
    source, peaks = open_source(model, base), {}
    _check_outputs(source, out, force=force)
    before = preflight(source, CompressOptions(prepare=names))
    if "scale" in names:
        device = resolve_device("auto")
        text = calibration_tokens(source, CalibrationOptions("self", tokens=SHORT_TEXT, seed=seed), device)
        peaks = neuron_peaks(source, text, device)
    prepared = PreparedSource(source, names, seed=seed, peaks=peaks, alpha=SCALE_ALPHA)
    logits, _ = dense_logits(prepared, torch.from_numpy(before.probe.batch))
    require_parity((prepared_tier(before, logits.numpy(), prepared.prepared),), source.name)
    return save_prepared(source, names, Path(out), seed=seed, peaks=peaks, alpha=SCALE_ALPHA, force=force)


def explain(bundle: str | Path) -> tuple[Finding, ...]:
    """Return what happened to each matrix of a bundle: the report's findings, and the plan where they say nothing.

    Raises:
        InputError: If the bundle's report or plan is missing or broken.
    """
    folder = Path(bundle)
    findings = Report.load(folder / "report.json").findings
    told = {finding.target for finding in findings}
    sites = {site.site: site for site in Plan.load(folder / "plan.json").sites}
    return (
        *(_with_runner_up(finding, sites.get(finding.target)) for finding in findings),
        *(_planned_only(site) for name, site in sites.items() if name not in told),
    )


def _with_runner_up(finding: Finding, site: SitePlan | None) -> Finding:
    """Return a finding that also says what the planner would have chosen next."""
    if site is None or not site.runner_up:
        return finding
    return replace(finding, details={**(finding.details or {}), "runner_up": site.runner_up})


def _planned_only(site: SitePlan) -> Finding:
    """Return the finding of a site that no pass touched in this run: it stayed as it was in the model."""
    if site.form == "dense" and site.quant is None:
        return Finding(site.site, Outcome.SKIPPED, site.reason or "not asked for: stays dense, in floats")
    details: dict[str, object] = {"rank": site.rank} if site.rank else {}
    if site.quant is not None:
        details |= site.quant.details()
    return Finding(site.site, Outcome.SKIPPED, "came so from the checkpoint", details=details)


def evaluate(
    model: str | Path,
    text: EvalText,
    *,
    base: str | Path | None = None,
    provider: Provider = "auto",
    threads: int | None = None,
) -> PerplexityResult:
    """Return the perplexity of a dense model or checkpoint in PyTorch, or of a bundle in ONNX Runtime.

    Args:
        model: As in `rk_export.evaluation.models.open_candidate`.
        text: What to measure on.
        base: As in `compress`.
        provider: Execution provider, of a bundle.
        threads: Threads of ONNX Runtime, of a bundle.

    Raises:
        InputError: If the model or the text cannot be used.
    """
    candidate = open_candidate(model, "--text", base=base, provider=provider, threads=threads)
    check_text(text, candidate.folder, candidate.max_length, candidate.rows)
    return perplexity_of(candidate.load(), text, candidate.folder)

"""From a model to a verified bundle: load, plan, rewrite, export, verify, bundle, a named stage each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from rk_export import planner
from rk_export.bundle import AtomicFolder, check_manifest
from rk_export.checkpoint import is_checkpoint, load_pretrained, save_pretrained
from rk_export.errors import InputError
from rk_export.folders import check_replaceable
from rk_export.frontend import check_supported
from rk_export.load import ModelSource, open_source
from rk_export.measure import EvalText, SpeedTest, check_text, context_length, perplexity_of, torch_logits
from rk_export.options import CompressOptions
from rk_export.parity import Golden, bundle_tiers, method_tiers, runtime_tiers
from rk_export.perplexity import PerplexityResult
from rk_export.plan import Plan, SitePlan
from rk_export.probe import make_probe
from rk_export.report import Finding, Outcome, ParityTier, Report
from rk_export.rewrite import QUANTIZED, resolve_device, rewrite
from rk_export.runtime import Session
from rk_export.runtime.providers import Provider
from rk_export.sizes import planned_findings
from rk_export.write_bundle import MODEL_FILES, BundleRequest, Stages, new_report, write_bundle


def make_plan(model: str | Path, options: CompressOptions | None = None) -> Plan:
    """Return the plan that `compress` would apply.

    Raises:
        InputError: If the model or an option cannot be used.
        UnsupportedModelError: If the family cannot be exported exactly.
    """
    source = open_source(model)
    return _plan(source, options or CompressOptions())


def _plan(source: ModelSource, options: CompressOptions) -> Plan:
    check_supported(source.config, ep=options.ep, dtype=options.float_dtype)
    return planner.make_plan(source, options)


def dry_run(model: str | Path, options: CompressOptions | None = None, *, plan: Plan | None = None) -> Report:
    """Return what `compress` would do, with sizes from shapes alone; nothing is written."""
    source = open_source(model)
    plan = _checked_plan(source, options, plan)
    return new_report(source.title, source.config.model_type, findings=tuple(planned_findings(source, plan)))


def _checked_plan(source: ModelSource, options: CompressOptions | None, plan: Plan | None) -> Plan:
    if plan is None:
        return _plan(source, options or CompressOptions())
    if options is not None:
        raise InputError(
            "a plan already holds the options", where="--plan", fix="drop the other compression options"
        )
    planner.check_plan(source, plan)
    check_supported(source.config, ep=plan.options.ep, dtype=plan.options.float_dtype)
    return plan


def compress(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
    plan: Plan | None = None,
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
        model: HF folder, hub id or GGUF file.
        out: Bundle folder; written beside its place and moved in once everything passed.
        options: What to do; the defaults factorize q/k and gate/up and quantize to INT4.
        plan: A plan made earlier, instead of options.
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
        source = open_source(model)
    with stages.stage("plan", "choosing ranks and bits"):
        plan = _checked_plan(source, options, plan)
        resolve_device(plan.options.device)
        if checkpoint is not None:
            check_replaceable(Path(checkpoint), force)
        if speed is not None:
            context_length(source.config, "--speed")
        if text is not None:
            check_text(text, source.folder, context_length(source.config, "--text"))
        needed = sum(finding.bytes_after for finding in planned_findings(source, plan))
    with AtomicFolder(out, force=force, needed=needed) as partial:
        probe = make_probe(source.folder, source.config.vocab_size)
        with stages.stage("rewrite", "factorizing and quantizing layer by layer"):
            rewritten = rewrite(source, plan, probe=torch.from_numpy(probe.batch))
        if checkpoint is not None:
            save_pretrained(rewritten, Path(checkpoint), tokenizer_from=source.folder, force=force)
        return write_bundle(partial, rewritten, source, request, stages, name=Path(out).name)


def export(
    model: str | Path,
    out: str | Path,
    options: CompressOptions | None = None,
    *,
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
        return compress(model, out, dense, triton=triton, threads=threads, force=force, command=command)
    if options is not None:
        raise InputError(
            "a checkpoint carries its own options", where=str(model), fix="drop the other options"
        )
    request = BundleRequest(triton=triton, threads=threads, command=command)
    stages = Stages()
    with AtomicFolder(out, force=force) as partial:
        with stages.stage("load", f"opening {model}"):
            rewritten = load_pretrained(folder)
        probe = make_probe(folder, rewritten.model.config.vocab_size)
        logits = torch_logits(rewritten.model)(probe.batch)
        rewritten = replace(rewritten, probe_logits={QUANTIZED: logits})
        return write_bundle(partial, rewritten, folder, request, stages, name=Path(out).name)


def verify(
    bundle: str | Path,
    against: str | Path | None = None,
    *,
    provider: Provider = "auto",
    threads: int | None = None,
) -> tuple[ParityTier, ...]:
    """Check a bundle's files and its parity.

    Args:
        bundle: The bundle folder.
        against: The dense model it was made from: the bundle's plan is applied to it again and every tier is
            measured. None measures what the bundle can show alone: tiers d to g.
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
        if manifest["golden"] is None:
            raise InputError(
                "an encoder bundle can only be verified against its model",
                where=str(folder),
                fix="give --against MODEL",
            )
        golden = Golden.from_json(manifest["golden"])
        return bundle_tiers(folder, golden, plan.options.float_dtype, provider=provider, threads=threads)
    source = open_source(against)
    probe = make_probe(source.folder, source.config.vocab_size)
    rewritten = rewrite(source, plan, probe=torch.from_numpy(probe.batch))
    tiers, _ = runtime_tiers(folder, rewritten, probe, provider=provider, threads=threads)
    return (*method_tiers(rewritten, probe), *tiers)


def explain(bundle: str | Path) -> tuple[Finding, ...]:
    """Return what happened to each matrix of a bundle: the report's findings, and the plan where they say nothing.

    Raises:
        InputError: If the bundle's report or plan is missing or broken.
    """
    folder = Path(bundle)
    findings = Report.load(folder / "report.json").findings
    told = {finding.target for finding in findings}
    sites = Plan.load(folder / "plan.json").sites
    return (*findings, *(_planned_only(site) for site in sites if site.site not in told))


def _planned_only(site: SitePlan) -> Finding:
    """Return the finding of a site that no pass touched in this run: it stayed as it was in the model."""
    if site.form == "dense" and site.quant is None:
        return Finding(site.site, Outcome.SKIPPED, site.reason or "not asked for: stays dense, in floats")
    details: dict[str, object] = {"rank": site.rank} if site.rank else {}
    if site.quant is not None:
        details |= {"bits": site.quant.bits, "block": site.quant.block_size}
    return Finding(site.site, Outcome.SKIPPED, "came so from the checkpoint", details=details)


def evaluate(
    model: str | Path, text: EvalText, *, provider: Provider = "auto", threads: int | None = None
) -> PerplexityResult:
    """Return the perplexity of a dense model or checkpoint in PyTorch, or of a bundle in ONNX Runtime.

    Raises:
        InputError: If the model or the text cannot be used.
    """
    folder = Path(model).expanduser()
    if (folder / MODEL_FILES[0]).is_file():
        session = Session.from_pretrained(folder, provider=provider, threads=threads)
        check_text(text, folder, session.max_length)
        return perplexity_of(session.prefill_logits, text, folder)
    if folder.is_dir() and is_checkpoint(folder):
        compressed = load_pretrained(folder).model
        check_text(text, folder, context_length(compressed.config, "--text"))
        return perplexity_of(torch_logits(compressed), text, folder)
    source = open_source(model)
    check_text(text, source.folder, context_length(source.config, "--text"))
    return perplexity_of(torch_logits(source.load()), text, source.folder)

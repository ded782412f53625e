"""Everything a bundle holds: the graph, the runtimes' configs, the proof of parity, the report."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import GenerationConfig

from rk_export.bundle.encoder_card import Kind
from rk_export.bundle.genai import exact_length, genai_config, length_note, write_genai_config
from rk_export.bundle.model_card import ModelCard, model_card
from rk_export.bundle.quality_warning import far_from_dense
from rk_export.graph.build import build_graph, save_graph
from rk_export.graph.sentence import add_sentence_embedding
from rk_export.json_codec import to_json
from rk_export.manifest import library_versions, write_manifest
from rk_export.memory import give_back
from rk_export.model.context import context_notices, context_of, with_context
from rk_export.model.sentence_modules import takes_modules
from rk_export.options.recipe import Recipe
from rk_export.parity.comparison import require_parity
from rk_export.parity.greedy import Golden
from rk_export.parity.preflight import Preflight
from rk_export.parity.probe import Probe
from rk_export.parity.tiers import checkpoint_tiers, method_tiers, runtime_tiers
from rk_export.planning.fixed_parts import fixed_findings
from rk_export.recipes import RECIPE, save_recipe
from rk_export.report.humanize import share, size
from rk_export.report.records import Finding, ParityTier, Report, SizeSummary
from rk_export.report.render import html
from rk_export.rewrite.accuracy_levels import choose_levels
from rk_export.rewrite.apply import Rewritten
from rk_export.rewrite.expert_groups import with_expert_findings
from rk_export.rewrite.sizes import size_summary
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.ends import read_ends
from rk_export.runtime.providers import Provider, SessionSettings, cuda_obstacle
from rk_export.runtime.sentence_files import MODULES_FILE
from rk_export.runtime.text import TextCodec
from rk_export.source.protocol import Source
from rk_export.source.sentence_head import SentenceHead, read_sentence_head
from rk_export.source.side_files import write_side_files

logger = logging.getLogger(__name__)

MODEL_FILES = ("model.onnx", "model.onnx.data")


@dataclass(frozen=True)
class BundleRequest:
    """What a bundle should hold beside the model.

    Args:
        threads: Threads of ONNX Runtime while verifying.
        command: Command line to note in the report.
    """

    threads: int | None = None
    command: str = ""

    def __post_init__(self) -> None:
        SessionSettings(threads=self.threads)  # refuses a wrong number now, not after the work


@dataclass
class Stages:
    """Times the stages of a run and logs a line for each."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[None]:
        """Time what runs inside; a stage that runs twice adds up."""
        logger.info("%s: %s", name, what)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            give_back()


def write_bundle(
    folder: Path,
    rewritten: Rewritten,
    origin: Source | Path,
    request: BundleRequest,
    stages: Stages,
    *,
    name: str,
    probe: Probe,
    before: Preflight | None = None,
) -> Report:
    """Export a rewritten model into a folder, verify it there, and write every other file.

    Args:
        folder: An empty folder.
        rewritten: The model with the logits of its probe.
        origin: The dense source, or the folder of the checkpoint that was loaded.
        request: What else to measure and write.
        stages: Receives the times.
        name: Name of the bundle.
        probe: The prompts.
        before: The untouched dense model on them; None for a checkpoint.

    Raises:
        FusionError: If a planned graph pattern is missing.
        ParityError: If a tier is out of its bound.
        InputError: If the tokenizer or the text cannot be used.
    """
    origin_folder = origin if isinstance(origin, Path) else origin.folder
    options = rewritten.plan.recipe
    rewritten = with_expert_findings(choose_levels(rewritten, torch.from_numpy(probe.batch)))
    with stages.stage("export", "tracing the graph and packing weights"):
        graph, fusions = build_graph(rewritten)
        head = sentence_head(rewritten, origin_folder)
        if head is not None:
            add_sentence_embedding(graph, head)
        save_graph(graph, folder)
    with stages.stage("bundle", "writing tokenizer and runtime configs"):
        base = None if isinstance(origin, Path) else origin.origin[1]
        write_configs(folder, rewritten, origin_folder, base)
    loaded = () if isinstance(origin, Path) else origin.notices
    provider, notices = _provider(options)
    known = () if before is None else before.notices
    with stages.stage("verify", "comparing ONNX Runtime with PyTorch"):
        method = checkpoint_tiers() if before is None else method_tiers(rewritten, before)
        runtime, golden = runtime_tiers(
            folder, rewritten, probe, head=head, provider=provider, threads=request.threads
        )
        tiers = (*method, *runtime)
        require_parity(tiers, str(folder))
    report = new_report(
        origin.name if isinstance(origin, Path) else origin.title,
        rewritten.plan.model_type,
        command=request.command,
        findings=_findings(rewritten, origin),
        fusions=fusions,
        parity=tiers,
        layer_errors=rewritten.layer_errors,
        spectra=rewritten.spectra,
        size=_size(folder, rewritten, origin),
        timings=dict(stages.seconds),
        warnings=far_from_dense(rewritten),
        notices=(
            *loaded,
            *known,
            *notices,
            *context_notices(rewritten.description, options.target.context_length),
            *tokens_without_rows(folder, rewritten.model.config.vocab_size),
            *_length_notice(rewritten),
            *_over_budget(folder, options),
            *_empty_sections(rewritten, origin),
        ),
    )
    for warning in report.warnings:
        logger.warning("WARNING: %s", warning)
    _write_report(folder, rewritten, report, golden, name)
    return report


def sentence_head(rewritten: Rewritten, folder: Path) -> SentenceHead | None:
    """Return what follows the hidden states of an encoder, or None where it has a head or its folder says nothing.

    Args:
        rewritten: The model.
        folder: Where its files lie.
    """
    if not takes_modules(rewritten.description):
        return None
    return read_sentence_head(folder, rewritten.model.config)


def _findings(rewritten: Rewritten, origin: Source | Path) -> tuple[Finding, ...]:
    """Return what became of each matrix, and what stands beside the matrices; a checkpoint tells neither."""
    if isinstance(origin, Path):
        return rewritten.findings
    return (*rewritten.findings, *fixed_findings(rewritten.description, rewritten.plan.recipe))


def new_report(model: str, model_type: str, **fields: Any) -> Report:
    """Return a report stamped with the present time and the libraries' versions."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return Report(model=model, model_type=model_type, created=created, versions=library_versions(), **fields)


def write_configs(folder: Path, rewritten: Rewritten, source: Path, base: Path | None) -> GenerationConfig:
    """Write tokenizer and the configs of the runtimes; `base` is the folder of the generation config, or None."""
    config = with_context(rewritten.model.config, rewritten.plan.recipe.target.context_length)
    generation = write_side_files(folder, source=source, config=config, generation_from=base)
    if not rewritten.architecture.is_encoder:
        ep: Literal["cpu", "cuda"] = "cuda" if rewritten.plan.recipe.target.ep == "cuda" else "cpu"
        context = exact_length(config)
        spec = rewritten.description.decoder
        values = genai_config(config, ep=ep, context_length=context, generation=generation, spec=spec)
        write_genai_config(folder, values)
    return generation


def _provider(recipe: Recipe) -> tuple[Provider, tuple[str, ...]]:
    """Return the execution provider to verify on, and a notice where it is not the one exported for."""
    if recipe.target.ep != "cuda":
        return "cpu", ()
    obstacle = cuda_obstacle()
    if obstacle is None:
        return "cuda", ()
    return "cpu", (f"verified on the CPU execution provider, not on CUDA: {obstacle}",)


def tokens_without_rows(folder: Path, rows: int) -> tuple[str, ...]:
    """Say, also in the log, which tokens of a tokenizer the model has no embedding for; runtimes refuse them.

    Args:
        folder: A bundle.
        rows: Rows of its model's embedding.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        return ()
    tokens = TextCodec(folder / TOKENIZER_FILE).token_ids()
    beyond = sorted((token, text) for text, token in tokens.items() if token >= rows)
    if not beyond:
        return ()
    shown = ", ".join(f"{text!r} ({token})" for token, text in beyond[:5])
    notice = (
        f"tokens of the tokenizer that have no row in the model's embedding of {rows} and are refused: "
        f"{len(beyond)}, namely {shown}{' ...' if len(beyond) > 5 else ''}"
    )
    logger.warning("%s", notice)
    return (notice,)


def _length_notice(rewritten: Rewritten) -> tuple[str, ...]:
    note = length_note(with_context(rewritten.model.config, rewritten.plan.recipe.target.context_length))
    return () if note is None else (note,)


def _over_budget(folder: Path, recipe: Recipe) -> tuple[str, ...]:
    """Say that files are larger than they were to be: what surrounds the matrices is only estimated before."""
    budget = recipe.limit
    if budget is None or budget.kind != "size" or file_bytes(folder) <= budget.amount:
        return ()
    return (f"the files take {size(file_bytes(folder))}, the budget was {size(round(budget.amount))}",)


def file_bytes(folder: Path) -> int:
    """Return the bytes of a bundle's model files."""
    return sum((folder / file).stat().st_size for file in MODEL_FILES if (folder / file).is_file())


def _size(folder: Path, rewritten: Rewritten, origin: Source | Path) -> SizeSummary | None:
    if isinstance(origin, Path):
        return None
    return size_summary(origin, rewritten, file_bytes(folder))


def _empty_sections(rewritten: Rewritten, origin: Source | Path) -> tuple[str, ...]:
    if isinstance(origin, Path):
        reason = "the model came from a compressed checkpoint"
        return tuple(
            f"{section}: not computed, {reason}" for section in ("spectra", "layers", "size", "matrices")
        )
    return () if rewritten.spectra else ("spectra: nothing was factorized",)


def _write_report(
    folder: Path, rewritten: Rewritten, report: Report, golden: Golden | None, name: str
) -> None:
    """Write plan, report, model card and, last, the manifest that lists every file."""
    options = rewritten.plan.recipe
    rewritten.plan.save(folder / "plan.json")
    save_recipe(folder / RECIPE, options)
    report.save(folder / "report.json")
    (folder / "report.html").write_text(html(report), encoding="utf-8")
    is_encoder = rewritten.architecture.is_encoder
    card = ModelCard(
        name=name,
        base_model=report.model,
        ep="cuda" if options.target.ep == "cuda" else "cpu",
        context_length=context_of(rewritten.model.config, options.target.context_length),
        length_note=length_note(with_context(rewritten.model.config, options.target.context_length)),
        summary=_summary(options),
        results=_results(report),
        ends=() if is_encoder else read_ends(folder).labels,
        encoder=_kind(folder, rewritten) if is_encoder else None,
        carries_states=not is_encoder and bool(rewritten.description.decoder.conv_layers),
    )
    (folder / "README.md").write_text(model_card(card), encoding="utf-8")
    info = {
        "source": {"model": report.model, "structure": rewritten.plan.structure},
        "ep": options.target.ep,
        "context_length": context_of(rewritten.model.config, options.target.context_length),
        "shared_kv_cache": not is_encoder,
        "parity": to_json(report.parity),
        "golden": to_json(golden),
    }
    write_manifest(folder, info)


def _kind(folder: Path, rewritten: Rewritten) -> Kind:
    """Return what an encoder's graph gives."""
    classifier = rewritten.description.encoder.classifier
    if classifier is not None:
        return "tokens" if classifier.by_token else "texts"
    return "vectors" if (folder / MODULES_FILE).is_file() else "states"


def _summary(recipe: Recipe) -> str:
    done = ", ".join(recipe.describe()) or "dense matrices"
    floats = "" if recipe.quant is not None else f", floats ({recipe.target.float_dtype})"
    return f"Compressed by rk-export: {done}{floats}."


def _results(report: Report) -> tuple[tuple[str, str], ...]:
    rows = []
    if report.size is not None:
        rows.append(("Kept parameters", share(report.size.kept_parameters, report.size.dense_parameters)))
        rows.append(("Files", size(report.size.file_bytes)))
    rows += [(f"Parity, tier {tier.tier}: {tier.name}", _verdict(tier)) for tier in report.parity]
    return tuple(rows)


def _verdict(tier: ParityTier) -> str:
    if tier.max_error is None:
        return tier.note
    outcome = {True: "passed", False: "FAILED", None: "measured"}[tier.passed]
    return f"{outcome}, largest error {tier.max_error:.3g} on a scale of {tier.scale:.3g}"

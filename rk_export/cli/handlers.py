"""What each command does once it is parsed: it calls the function of the same name and prints."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rk_export.cli.compress_arguments import asked_recipe
from rk_export.cli.terminal import print_json, show
from rk_export.errors import InputError
from rk_export.json_codec import to_json

if TYPE_CHECKING:
    from pathlib import Path

    from rk_export.evaluation.measure import EvalText
    from rk_export.options.run import Run
    from rk_export.plan import Plan


logger = logging.getLogger(__name__)


def _run_of(args: argparse.Namespace) -> Run:
    from rk_export.options.run import Run

    texts = tuple(getattr(args, "calibration_text", ()))
    return Run(args.device, args.threads, texts, getattr(args, "workers", 1), getattr(args, "ray", None))


def _plan_of(args: argparse.Namespace) -> Plan | None:
    from rk_export.plan import Plan

    return None if args.plan is None else Plan.load(args.plan)


def texts_of(args: argparse.Namespace, paths: Sequence[Path]) -> list[EvalText]:
    """Return the texts to measure perplexity on.

    Raises:
        InputError: If there is none, and something is said about how to measure.
    """
    from rk_export.evaluation.measure import EvalText

    for name in ("context", "tokens"):
        if not paths and getattr(args, name) is not None:
            raise InputError("goes with --text", where=f"--{name}", fix="give --text FILE, or drop it")
    context = EvalText.context if args.context is None else args.context
    return [EvalText(path, context, args.tokens) for path in paths]


def run_compress(args: argparse.Namespace) -> int:
    """`compress`, or its dry run."""
    from rk_export.commands.compress import compress
    from rk_export.commands.dry_run import dry_run
    from rk_export.report.render import summary

    recipe, plan, run = asked_recipe(args), _plan_of(args), _run_of(args)
    if args.dry_run:
        found = dry_run(
            args.model,
            recipe,
            plan=plan,
            base=args.base,
            run=run,
            out=args.output,
            checkpoint=args.checkpoint,
            force=args.force,
        )
        print_json(found.to_json()) if args.json else show(*found.blocks())
        return 0
    report = compress(
        args.model,
        args.output,
        recipe,
        plan=plan,
        base=args.base,
        run=run,
        checkpoint=args.checkpoint,
        force=args.force,
        resume=not args.no_resume,
        command=args.command_line,
    )
    print_json(report.to_json()) if args.json else show(*summary(report))
    logger.info("\nbundle  %s\nreport  %s", args.output, args.output / "report.html")
    return 0


def run_analyze(args: argparse.Namespace) -> int:
    """`analyze`."""
    from rk_export.commands.analyze import analyze

    report = analyze(
        args.model,
        args.output,
        asked_recipe(args),
        plan=_plan_of(args),
        base=args.base,
        run=_run_of(args),
        command=args.command_line,
        force=args.force,
    )
    if args.json:
        print_json(report.to_json())
        return 0
    print(f"{len(report.spectra)} spectra\nreport  {args.output / 'report.html'}")
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """`plan`."""
    from rk_export.commands.plan import make_plan
    from rk_export.folders import check_plan_place
    from rk_export.planning.fixed_parts import fixed_parts, in_words
    from rk_export.source.stored import open_source

    check_plan_place(args.output, args.force)
    plan = make_plan(args.model, asked_recipe(args), base=args.base, run=_run_of(args))
    plan.save(args.output)
    if args.json:
        print_json(plan.to_json())
        return 0
    parts = in_words(fixed_parts(open_source(args.model, args.base).description, plan.recipe))
    print(f"{len(plan.sites)} sites; beside them {parts}\nplan  {args.output}")
    return 0


def run_prepare(args: argparse.Namespace) -> int:
    """`prepare`."""
    from rk_export.commands.prepare import prepare
    from rk_export.options.run import Run
    from rk_export.report.tables import matrices_table

    names = tuple(args.passes.split(","))
    findings = prepare(
        *(args.model, args.output, names),
        base=args.base,
        run=Run(args.device),
        seed=args.seed,
        force=args.force,
    )
    print_json(to_json(findings)) if args.json else show(matrices_table(findings))
    logger.info("\nmodel  %s", args.output)
    return 0


def run_export(args: argparse.Namespace) -> int:
    """`export`."""
    from rk_export.commands.export import export
    from rk_export.options.run import Run
    from rk_export.report.render import summary

    report = export(
        args.model,
        args.output,
        base=args.base,
        ep=args.ep,
        context_length=args.context_length,
        run=Run(threads=args.threads),
        force=args.force,
        command=args.command_line,
    )
    print_json(report.to_json()) if args.json else show(*summary(report))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """`verify`: 0 when every bounded tier passed, else 1."""
    from rk_export.commands.verify import verify
    from rk_export.report.tables import parity_table

    tiers = verify(
        args.bundle, args.against, key=args.key, base=args.base, provider=args.provider, run=_run_of(args)
    )
    print_json(to_json(tiers)) if args.json else show(parity_table(tiers))
    return int(any(tier.passed is False for tier in tiers))


def run_eval(args: argparse.Namespace) -> int:
    """`eval`: one perplexity, or a table of all models, texts and tasks."""
    from rk_export.evaluation.models import evaluate_models
    from rk_export.evaluation.score_table import score_table, scores_json
    from rk_export.evaluation.tasks import load_tasks

    texts = texts_of(args, args.text)
    if args.limit is not None and not args.tasks:
        raise InputError("goes with --tasks", where="--limit", fix="give --tasks FILE, or drop it")
    runtime = {"base": args.base, "provider": args.provider, "threads": args.threads}
    if not args.tasks and len(args.models) == len(texts) == 1:
        return _print_perplexity(args.models[0], texts[0], args.json, runtime)
    tasks = load_tasks(args.tasks, args.limit)
    scores = evaluate_models(args.models, texts=texts, tasks=tasks, **runtime)
    print_json(scores_json(scores)) if args.json else show(score_table(scores))
    return 0


def _print_perplexity(model: str, text: EvalText, as_json: bool, runtime: dict[str, Any]) -> int:
    from rk_export.commands.evaluate import evaluate

    result = evaluate(model, text, **runtime)
    if as_json:
        print_json(to_json(result))
        return 0
    value = f"perplexity {result.perplexity:.3f} ± {result.perplexity_error:.3f}"
    loss = f"mean negative log likelihood {result.nll:.4f} ± {result.standard_error:.4f}"
    print(f"{value}  ({loss}, {result.tokens} tokens, context {result.context})")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """`bench`."""
    from rk_export.runtime import bench
    from rk_export.text import tokens_of

    # genai:FOLDER, draft:SMALL:FOLDER: the folder stands last.
    prompt = None if args.text is None else tokens_of(args.text, args.bundle.rpartition(":")[2]).tolist()
    result = bench(
        [args.bundle, *args.against],
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        threads=2 if args.threads is None else args.threads,
        provider=args.provider,
        prompt=prompt,
    )
    print_json(result.to_json()) if args.json else show(result.table())
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """`explain`."""
    from rk_export.commands.explain import explain
    from rk_export.report.tables import matrices_table

    findings = explain(args.bundle)
    print_json(to_json(findings)) if args.json else show(matrices_table(findings))
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """`doctor`: 0 when export and CPU inference can work, else 1."""
    from rk_export.commands.doctor import diagnose

    diagnosis = diagnose()
    print_json(diagnosis.to_json()) if args.json else show(*diagnosis.blocks())
    return 0 if diagnosis.ok else 1

"""Command line: parses, calls the API with the same names, prints. Nothing else."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rk_export.cli.compress_arguments import (
    add_context_argument,
    add_format_arguments,
    add_rank_arguments,
    compress_options,
)
from rk_export.cli.method_arguments import add_method_arguments
from rk_export.cli.run import add_run_arguments, run_run
from rk_export.cli.terminal import show, work_shown
from rk_export.errors import InputError, RkExportError
from rk_export.json_codec import to_json

if TYPE_CHECKING:
    from rk_export.evaluation.measure import EvalText
    from rk_export.options.run import Run
    from rk_export.plan import Plan

Command = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Command, str], argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 (parity or check failed) or 2 (bad input)."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    return run_command(args.run, args, ["rk-export", *words])


def run_command(command: Command, args: argparse.Namespace, words: Sequence[str]) -> int:
    """Run a command with logs and progress on stderr and our errors as messages; return the exit status.

    Args:
        command: One of the `run_...` functions.
        args: Its parsed arguments.
        words: The command line, which reports repeat.
    """
    args.command_line = shlex.join(map(_without_folders, words))
    quiet_libraries()
    try:
        with work_shown(bars=not getattr(args, "json", False)):
            return command(args)
    except RkExportError as error:
        print(f"rk-export: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("rk-export: interrupted; outputs are as they were", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:  # a file that may not be read, a name that is too long, a disk that fails
        if error.filename is None:
            raise
        problem = InputError(
            str(error.strerror), where=str(error.filename), fix="check the path and your rights to it"
        )
        print(f"rk-export: error: {problem}", file=sys.stderr)
        return problem.exit_code


def _without_folders(word: str) -> str:
    """Return a word of the command line with absolute paths by their names: reports travel with bundles."""
    kind, colon, place = word.rpartition(":")
    return f"{kind}{colon}{Path(place).name}" if place.startswith(("/", "~")) else word


def quiet_libraries() -> None:
    """Leave the terminal to our own lines."""
    for name in (
        "httpx",
        "mobius",
        "onnxscript",
        "onnx_ir",
        "onnx_shape_inference",
        "matplotlib",
        "fontTools",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="rk-export",
        description="Compress Hugging Face language models, export them to ONNX Runtime, and prove parity.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_own_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.set_defaults(run=run)
        return command

    _add_model_commands(add)
    _add_bundle_commands(add)
    return parser


def _own_version() -> str:
    try:
        return metadata.version("rk-export")
    except metadata.PackageNotFoundError:
        return "of a source tree that is not installed"


def _add_model_commands(add: AddCommand) -> None:
    """Add the commands that read a model."""
    compress = add("compress", run_compress, "compress a model and write a verified ONNX bundle")
    add_compress_arguments(compress)

    analyze = add("analyze", run_analyze, "spectra and effective ranks of a model, as JSON, plots and a page")
    _add_model(analyze)
    _add_output(analyze, "folder for report.json, report.html and plots")
    add_rank_arguments(analyze)
    _add_plan(analyze)
    _add_run(analyze)

    plan = add("plan", run_plan, "write the plan that compress would apply, to read and edit")
    _add_model(plan)
    _add_output(plan, "plan file (JSON)")
    add_rank_arguments(plan)
    add_method_arguments(plan)
    add_format_arguments(plan)
    _add_run(plan)

    prepare = add("prepare", run_prepare, "reparameterize a model exactly: same logits, other weights")
    _add_model(prepare)
    _add_output(prepare, "HF folder")
    prepare.add_argument(
        "--passes",
        default="fold,rotate-heads,scale",
        help="fold, rotate, rotate-heads, scale (default fold,rotate-heads,scale)",
    )
    prepare.add_argument("--seed", type=int, default=0, help="of the rotations (default 0)")
    prepare.add_argument("--device", **_DEVICE)

    export = add("export", run_export, "export a compressed checkpoint, or a dense model as it is")
    _add_model(export, "checkpoint folder, HF folder, hub id, .gguf file or LoRA adapter")
    _add_output(export, "bundle folder")
    export.add_argument(
        "--ep", default=None, help="cpu (fp32), cuda (fp16) or portable (fp16); dense models only"
    )
    add_context_argument(export)
    _add_bundle_arguments(export, texts=False)


def _add_bundle_commands(add: AddCommand) -> None:
    """Add the commands that work on what was made, and `doctor`."""
    verify = add("verify", run_verify, "check a bundle's files and parity; exit 0 or 1")
    verify.add_argument("bundle", type=Path)
    verify.add_argument("--against", metavar="MODEL", help="the dense model: measures every tier anew")
    _add_base(verify)
    verify.add_argument("--provider", **_PROVIDER)
    _add_run(verify)
    _add_json(verify)

    evaluate = add("eval", run_eval, "perplexity and task accuracy of models, checkpoints and bundles")
    evaluate.add_argument("models", nargs="+", metavar="MODEL", help="dense model, checkpoint or bundle")
    _add_base(evaluate)
    evaluate.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="UTF-8 texts")
    _add_text_arguments(evaluate)
    evaluate.add_argument(
        "--tasks", type=Path, nargs="+", default=[], metavar="FILE", help="tasks, NAME.jsonl"
    )
    evaluate.add_argument("--limit", type=int, help="at most so many items a task, the same for every model")
    _add_runtime_arguments(evaluate)
    _add_json(evaluate)

    run = add("run", run_run, "generate text with a bundle, streaming, or chat with it")
    run.add_argument("bundle", type=Path)
    add_run_arguments(run)
    _add_runtime_arguments(run)

    bench = add("bench", run_bench, "prefill and decode speed, interleaved, medians and ratios")
    bench.add_argument("bundle")
    bench.add_argument(
        "--against", nargs="+", default=[], metavar="OTHER", help="bundles; genai:PATH runs GenAI"
    )
    bench.add_argument("--prompt-tokens", type=int, default=512)
    bench.add_argument("--new-tokens", type=int, default=64)
    bench.add_argument("--repeats", type=int, default=5)
    _add_runtime_arguments(bench)
    _add_json(bench)

    explain = add("explain", run_explain, "what happened to each matrix of a bundle, and why")
    explain.add_argument("bundle", type=Path)
    _add_json(explain)

    doctor = add(
        "doctor", run_doctor, "versions, usable execution providers, what is missing and how to get it"
    )
    _add_json(doctor)


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compress`."""
    parser.add_argument("model", help="HF folder, hub id, .gguf file or LoRA adapter")
    parser.add_argument("-o", "--output", type=Path, required=True, help="bundle folder")
    add_compress_options(parser)


def add_compress_options(parser: argparse.ArgumentParser) -> None:
    """Add what `compress` takes beside model and output; optimum's command takes the same."""
    _add_base(parser)
    _add_force(parser)
    add_rank_arguments(parser)
    add_method_arguments(parser)
    add_format_arguments(parser)
    _add_plan(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="show what would be done and its size; write nothing"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="measure dense and compressed perplexity on a text"
    )
    _add_text_arguments(parser)
    parser.add_argument("--speed", action="store_true", help="measure the bundle's tokens per second")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="also save the compressed PyTorch model"
    )
    _add_bundle_arguments(parser, texts=True)


def _add_model(
    parser: argparse.ArgumentParser, text: str = "HF folder, hub id, .gguf file or LoRA adapter"
) -> None:
    parser.add_argument("model", help=text)
    _add_base(parser)


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="the base model of a LoRA adapter (default: the one that its adapter_config.json names)",
    )


def _add_output(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("-o", "--output", type=Path, required=True, help=text)
    _add_force(parser)


def _add_force(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace an existing output")


def _add_text_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--context", type=int, default=512, help="window in tokens (default 512)")
    parser.add_argument("--tokens", type=int, default=None, help="only the first tokens of the text")


def _add_bundle_arguments(parser: argparse.ArgumentParser, *, texts: bool) -> None:
    parser.add_argument("--triton", metavar="NAME", help="also add a Triton model repository")
    _add_run(parser, texts=texts)
    _add_json(parser)


_DEVICE: dict[str, Any] = {
    "default": "auto",
    "help": "where PyTorch works: auto, cpu, cuda, cuda:N (default auto)",
}
_PROVIDER: dict[str, Any] = {"default": "auto", "help": "auto, cpu or cuda (default auto)"}
_THREADS: dict[str, Any] = {"type": int, "help": "threads of ONNX Runtime"}


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, metavar="FILE", help="take this plan instead of options")


def _add_run(parser: argparse.ArgumentParser, *, texts: bool = True) -> None:
    """Add what describes the machine; it goes with a plan too."""
    parser.add_argument("--device", **_DEVICE)
    parser.add_argument("--threads", **_THREADS)
    if not texts:
        return
    parser.add_argument(
        "--calibration-text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="where the text of a plan lies here: it is known by its content",
    )


def _run_of(args: argparse.Namespace) -> Run:
    from rk_export.options.run import Run

    return Run(args.device, args.threads, tuple(getattr(args, "calibration_text", ())))


def _plan_of(args: argparse.Namespace) -> Plan | None:
    from rk_export.plan import Plan

    return None if args.plan is None else Plan.load(args.plan)


def _add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--provider", **_PROVIDER)
    parser.add_argument("--threads", **_THREADS)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _print_json(data: object) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


def run_compress(args: argparse.Namespace) -> int:
    """`compress`, or its dry run."""
    from rk_export.commands.compress import compress, dry_run
    from rk_export.evaluation.measure import EvalText, SpeedTest
    from rk_export.report.render import planned, summary

    options, plan, run = compress_options(args), _plan_of(args), _run_of(args)
    if args.dry_run:
        report = dry_run(
            args.model,
            options,
            plan=plan,
            base=args.base,
            run=run,
            out=args.output,
            checkpoint=args.checkpoint,
            force=args.force,
        )
        _print_json(report.to_json()) if args.json else show(*planned(report))
        return 0
    report = compress(
        args.model,
        args.output,
        options,
        plan=plan,
        base=args.base,
        run=run,
        text=None if args.text is None else EvalText(args.text, args.context, args.tokens),
        speed=SpeedTest() if args.speed else None,
        checkpoint=args.checkpoint,
        triton=args.triton,
        force=args.force,
        command=args.command_line,
    )
    _print_json(report.to_json()) if args.json else show(*summary(report))
    print(f"\nbundle  {args.output}\nreport  {args.output / 'report.html'}", file=sys.stderr)
    return 0


def run_analyze(args: argparse.Namespace) -> int:
    """`analyze`."""
    from rk_export.commands.analyze import analyze

    report = analyze(
        args.model,
        args.output,
        compress_options(args),
        plan=_plan_of(args),
        base=args.base,
        run=_run_of(args),
        command=args.command_line,
        force=args.force,
    )
    print(f"{len(report.spectra)} spectra\nreport  {args.output / 'report.html'}")
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """`plan`."""
    from rk_export.commands.plan import make_plan
    from rk_export.folders import check_plan_place
    from rk_export.planning.fixed_parts import fixed_parts, in_words
    from rk_export.source.stored import open_source

    check_plan_place(args.output, args.force)
    plan = make_plan(args.model, compress_options(args), base=args.base, run=_run_of(args))
    plan.save(args.output)
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
    show(matrices_table(findings))
    print(f"\nmodel  {args.output}", file=sys.stderr)
    return 0


def run_export(args: argparse.Namespace) -> int:
    """`export`."""
    from rk_export.commands.export import export
    from rk_export.options.recipe import Recipe
    from rk_export.report.render import summary

    report = export(
        args.model,
        args.output,
        None if args.ep is None else Recipe(ep=args.ep),
        base=args.base,
        context_length=args.context_length,
        run=_run_of(args),
        triton=args.triton,
        force=args.force,
        command=args.command_line,
    )
    _print_json(report.to_json()) if args.json else show(*summary(report))
    return 0


def run_verify(args: argparse.Namespace) -> int:
    """`verify`: 0 when every bounded tier passed, else 1."""
    from rk_export.commands.verify import verify
    from rk_export.report.tables import parity_table

    tiers = verify(args.bundle, args.against, base=args.base, provider=args.provider, run=_run_of(args))
    _print_json(to_json(tiers)) if args.json else show(parity_table(tiers))
    return int(any(tier.passed is False for tier in tiers))


def run_eval(args: argparse.Namespace) -> int:
    """`eval`: one perplexity, or a table of all models, texts and tasks."""
    from rk_export.evaluation.measure import EvalText
    from rk_export.evaluation.models import evaluate_models
    from rk_export.evaluation.score_table import score_table, scores_json
    from rk_export.evaluation.tasks import load_tasks

    texts = [EvalText(path, args.context, args.tokens) for path in args.text]
    runtime = {"base": args.base, "provider": args.provider, "threads": args.threads}
    if not args.tasks and len(args.models) == len(texts) == 1:
        return _print_perplexity(args.models[0], texts[0], args.json, runtime)
    tasks = load_tasks(args.tasks, args.limit)
    scores = evaluate_models(args.models, texts=texts, tasks=tasks, **runtime)
    _print_json(scores_json(scores)) if args.json else show(score_table(scores))
    return 0


def _print_perplexity(model: str, text: EvalText, as_json: bool, runtime: dict[str, Any]) -> int:
    from rk_export.commands.evaluate import evaluate

    result = evaluate(model, text, **runtime)
    if as_json:
        _print_json(to_json(result))
        return 0
    value = f"perplexity {result.perplexity:.3f} ± {result.perplexity_error:.3f}"
    loss = f"mean negative log likelihood {result.nll:.4f} ± {result.standard_error:.4f}"
    print(f"{value}  ({loss}, {result.tokens} tokens, context {result.context})")
    return 0


def run_bench(args: argparse.Namespace) -> int:
    """`bench`."""
    from rk_export.runtime import bench

    result = bench(
        [args.bundle, *args.against],
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        threads=args.threads or 2,
        provider=args.provider,
    )
    _print_json(result.to_json()) if args.json else show(result.table())
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """`explain`."""
    from rk_export.commands.explain import explain
    from rk_export.report.tables import matrices_table

    findings = explain(args.bundle)
    _print_json(to_json(findings)) if args.json else show(matrices_table(findings))
    return 0


def run_doctor(args: argparse.Namespace) -> int:
    """`doctor`: 0 when export and CPU inference can work, else 1."""
    from rk_export.commands.doctor import diagnose

    diagnosis = diagnose()
    _print_json(diagnosis.to_json()) if args.json else show(*diagnosis.blocks())
    return 0 if diagnosis.ok else 1


if __name__ == "__main__":
    sys.exit(main())

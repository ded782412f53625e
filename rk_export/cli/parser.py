"""The parser of all commands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from rk_export.cli.bundle import add_bundle_arguments, run_bundle
from rk_export.cli.cache import add_cache_arguments, add_cache_limit, run_cache
from rk_export.cli.compare import add_compare_arguments, run_compare
from rk_export.cli.compress_arguments import add_recipe_arguments
from rk_export.cli.examples import epilog
from rk_export.cli.failure import Parser
from rk_export.cli.handlers import (
    run_analyze,
    run_bench,
    run_compress,
    run_doctor,
    run_eval,
    run_explain,
    run_export,
    run_plan,
    run_prepare,
    run_verify,
)
from rk_export.cli.recipes import add_recipes_arguments, run_recipes
from rk_export.cli.report import add_report_arguments, run_report
from rk_export.cli.run import add_run_arguments, run_run
from rk_export.cli.serve import add_serve_arguments, run_serve
from rk_export.cli.sign import add_sign_arguments, run_sign

Command = Callable[[argparse.Namespace], int]
AddCommand = Callable[[str, Command, str], argparse.ArgumentParser]
_DEVICE: dict[str, Any] = {
    "default": "auto",
    "help": "where PyTorch works: auto, cpu, cuda, cuda:N (default auto)",
}
_PROVIDER: dict[str, Any] = {"default": "auto", "help": "auto, cpu or cuda (default auto)"}
_THREADS: dict[str, Any] = {"type": int, "help": "threads of ONNX Runtime"}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="rk-export",
        description="Compress Hugging Face language models, export them to ONNX Runtime, and prove parity.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_own_version()}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Command, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=epilog(name),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    _add_model_commands(add)
    _add_bundle_commands(add)
    for command in commands.choices.values():
        add_output_arguments(command)
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
    add_recipe_arguments(analyze, target=False)
    _add_plan(analyze)
    _add_run(analyze)

    plan = add("plan", run_plan, "write the plan that compress would apply, to read and edit")
    _add_model(plan)
    _add_output(plan, "plan file (JSON)")
    add_recipe_arguments(plan)
    _add_run(plan)

    add_recipes_arguments(
        add("recipes", run_recipes, "list the presets, print one to edit, or explain every field")
    )

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
        "--ep",
        choices=("cpu", "cuda", "portable"),
        help="cpu (fp32), cuda (fp16) or portable (fp16) (default cpu); dense models only",
    )
    export.add_argument(
        "--context-length",
        type=int,
        metavar="TOKENS",
        help="most tokens of prompt and answer together (default the model's own)",
    )
    export.add_argument("--threads", **_THREADS)


def _add_bundle_commands(add: AddCommand) -> None:
    """Add the commands that work on what was made, and `doctor`."""
    verify = add("verify", run_verify, "check a bundle's files and parity; exit 0 or 1")
    verify.add_argument("bundle", type=Path, help="bundle folder")
    verify.add_argument(
        "--key", type=Path, metavar="FILE", help="public key (PEM): the bundle's signature is checked first"
    )
    verify.add_argument("--against", metavar="MODEL", help="the dense model: measures every tier anew")
    _add_base(verify)
    verify.add_argument("--provider", **_PROVIDER)
    _add_run(verify)

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

    run = add("run", run_run, "generate text with a bundle, chat with it, or run an encoder on a text")
    run.add_argument("bundle", type=Path, help="bundle folder")
    add_run_arguments(run)
    _add_runtime_arguments(run)

    serve = add("serve", run_serve, "answer OpenAI's HTTP interface with bundles")
    add_serve_arguments(serve)
    _add_runtime_arguments(serve)

    bench = add("bench", run_bench, "prefill and decode speed, interleaved, medians and ratios")
    bench.add_argument("bundle", help="bundle folder; genai:OUT runs GenAI")
    bench.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="OTHER",
        help="bundles; genai:OUT runs GenAI, lookup:OUT and draft:SMALL:OUT guess ahead",
    )
    bench.add_argument(
        "--text", type=Path, metavar="FILE", help="whose beginning is the prompt (default random tokens)"
    )
    bench.add_argument("--prompt-tokens", type=int, default=512, help="of the prefill (default 512)")
    bench.add_argument("--new-tokens", type=int, default=64, help="decoded after it (default 64)")
    bench.add_argument("--repeats", type=int, default=5, help="rounds; the median counts (default 5)")
    _add_runtime_arguments(bench)

    compare = add("compare", run_compare, "put bundles side by side: size, quality, speed, parity, matrices")
    add_compare_arguments(compare)
    _add_base(compare)
    _add_text_arguments(compare)
    _add_runtime_arguments(compare)

    add_report_arguments(add("report", run_report, "show what a run found, or open its page"))

    add_bundle_arguments(add("bundle", run_bundle, "add deployment files to a finished bundle"))

    add_sign_arguments(add("sign", run_sign, "sign a bundle, so that others can tell that it is yours"))

    explain = add("explain", run_explain, "show what happened to each matrix of a bundle, and why")
    explain.add_argument("bundle", type=Path, help="bundle folder")

    add_cache_arguments(add("cache", run_cache, "list what costly results are kept, or remove some"))

    add("doctor", run_doctor, "versions, usable execution providers, what is missing and how to get it")


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compress`."""
    parser.add_argument("model", help="HF folder, hub id, .gguf file or LoRA adapter")
    parser.add_argument("-o", "--output", type=Path, required=True, help="bundle folder")
    add_compress_options(parser)


def add_compress_options(parser: argparse.ArgumentParser) -> None:
    """Add what `compress` takes beside model and output; optimum's command takes the same."""
    _add_base(parser)
    _add_force(parser)
    parser.add_argument(
        "--no-resume", action="store_true", help="begin anew where an earlier run was interrupted"
    )
    add_recipe_arguments(parser)
    _add_plan(parser)
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show memory, disk and time of each stage, and sizes as far as shapes tell; nothing is done",
    )
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="also save the compressed PyTorch model"
    )
    workers = parser.add_mutually_exclusive_group()
    workers.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="processes that finish layers side by side, one a GPU where there are several (default 1)",
    )
    workers.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="a Ray cluster whose nodes finish them: HOST:PORT or auto; needs shared storage and `rk-export[ray]`",
    )
    _add_run(parser)


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
    parser.add_argument("--context", type=int, help="window in tokens (default 512)")
    parser.add_argument("--tokens", type=int, default=None, help="only the first tokens of the text")


def _add_plan(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plan", type=Path, metavar="FILE", help="take this plan instead of a recipe")


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Add what describes the machine; it goes with a plan too."""
    parser.add_argument("--device", **_DEVICE)
    parser.add_argument("--threads", **_THREADS)
    add_cache_limit(parser)
    parser.add_argument(
        "--calibration-text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="where the text of a plan lies here: it is known by its content",
    )


def _add_runtime_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--provider", **_PROVIDER)
    parser.add_argument("--threads", **_THREADS)


def add_output_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes about what it shows; optimum's command takes the same.

    With `--json` standard output holds one JSON document and nothing else. Errors go to standard error, as one line of
    JSON; exit statuses are the same in both forms.
    """
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--json",
        action="store_true",
        help="print the result as one JSON document, and errors as JSON on stderr",
    )
    shown.add_argument(
        "--quiet", action="store_true", help="no log lines, warnings and bars: results and errors only"
    )

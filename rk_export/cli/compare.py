"""The command `compare`: several bundles side by side, on the terminal or as a page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rk_export.cli.handlers import texts_of
from rk_export.cli.terminal import print_json, show
from rk_export.errors import InputError


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `compare` takes beside what every command on bundles takes."""
    parser.add_argument(
        "models", nargs="+", metavar="BUNDLE", help="bundles; the first one is compared against"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write a page (HTML)")
    parser.add_argument("--force", action="store_true", help="replace an existing page")
    parser.add_argument(
        "--text",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="measure perplexity on UTF-8 texts; dense models and checkpoints may be named then",
    )
    parser.add_argument("--tasks", type=Path, nargs="+", default=[], metavar="FILE", help="tasks, NAME.jsonl")
    parser.add_argument("--limit", type=int, help="at most so many items a task, the same for every model")
    parser.add_argument("--speed", action="store_true", help="measure the bundles' speed in turns")


def run_compare(args: argparse.Namespace) -> int:
    """`compare`: a table, and a page where one is asked for."""
    from rk_export.commands.compare import compare
    from rk_export.evaluation.measure import SpeedTest
    from rk_export.evaluation.tasks import load_tasks
    from rk_export.report.comparison_page import comparison_blocks, comparison_html

    texts = texts_of(args, args.text)
    _check_used(args)
    if args.output is not None:
        _check_page(args.output, args.force)
    comparison = compare(
        args.models,
        texts=texts,
        tasks=load_tasks(args.tasks, args.limit),
        speed=SpeedTest() if args.speed else None,
        base=args.base,
        provider=args.provider,
        threads=args.threads,
        command=args.command_line,
    )
    if args.json:
        print_json(comparison.to_json())
    else:
        show(*comparison_blocks(comparison))
    if args.output is not None:
        from rk_export.atomic import atomic_file

        with atomic_file(args.output) as partial:
            partial.write_text(comparison_html(comparison), encoding="utf-8")
        print(f"\npage  {args.output}", file=sys.stderr)
    return 0


def _check_used(args: argparse.Namespace) -> None:
    """Refuse options that nothing would use: reports are read as they are."""
    run = args.text or args.tasks
    unused = {
        "--limit": ("--tasks FILE", args.limit is not None and not args.tasks),
        "--base": ("--text FILE or --tasks FILE", args.base is not None and not run),
        "--threads": ("--text, --tasks or --speed", args.threads is not None and not (run or args.speed)),
        "--provider": ("--text, --tasks or --speed", args.provider != "auto" and not (run or args.speed)),
        "--force": ("-o FILE", args.force and args.output is None),
    }
    for name, (partner, is_unused) in unused.items():
        if is_unused:
            raise InputError(f"goes with {partner}", where=name, fix=f"give {partner}, or drop it")


def _check_page(page: Path, force: bool) -> None:
    """Refuse, before any work, a place where no page can be written."""
    if page.suffix not in (".html", ".htm"):
        raise InputError(
            f"{page.name} is no name of a page", where="-o", fix="give a name that ends in .html"
        )
    if page.is_dir():
        raise InputError("is a folder", where=str(page), fix="give the name of a file")
    if page.exists() and not force:
        raise InputError("already exists", where=str(page), fix="choose another name or give --force")

"""The command `report`: what a run found, on the terminal or in the browser."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from rk_export.cli.terminal import print_json, show
from rk_export.errors import InputError


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `report`."""
    parser.add_argument("folder", type=Path, help="a bundle, or a folder of spectra that analyze wrote")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run_report(args: argparse.Namespace) -> int:
    """`report`: the summary that `compress` ends with, and where the page lies."""
    from rk_export.folders import read_report
    from rk_export.report.render import summary

    report = read_report(args.folder)
    page = args.folder.expanduser() / "report.html"
    if args.json:
        print_json(report.to_json())
    else:
        show(*summary(report), f"report  {page}" if page.is_file() else "report.html is not in this folder")
    if args.open:
        _open(page)
    return 0


def _open(page: Path) -> None:
    if not page.is_file():
        raise InputError("there is no page to open", where=str(page), fix="copy report.html with the folder")
    if not webbrowser.open(page.resolve().as_uri()):
        raise InputError("no browser was found", where="--open", fix=f"open {page} yourself")

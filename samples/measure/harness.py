"""What all measurements share: rows kept as JSON as soon as they are measured, pages and plots drawn from them.

A script names its rows as pairs of a key and a function that measures it. Rows that are in the results already are not
measured again, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import assets
import matplotlib
import torch
from matplotlib.figure import Figure

from rk_export import (
    EvalText,
    InputError,
    RkExportError,
    library_versions,
    open_source,
    perplexity_of,
    quiet_libraries,
    torch_logits,
)

logger = logging.getLogger("measure")

Row = dict[str, Any]
Rows = dict[str, Row]
Measure = Callable[[], Row]
P = ParamSpec("P")
T = TypeVar("T")
RESULTS = Path("docs/results")
DEFAULT_MODEL = "SmolLM2-135M-Instruct"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#5b5b5b", "#882255")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "svg.hashsalt": "rk-export",  # the same bytes every time
}


def parser(description: str | None, *groups: str) -> argparse.ArgumentParser:
    """Return the arguments of a measurement: `--out`, and those of the groups `model`, `text` and `rows`."""
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if "model" in groups:
        result.add_argument(
            "--model", help=f"HF folder, hub id or .gguf file (default {DEFAULT_MODEL}, fetched)"
        )
    if "text" in groups:
        result.add_argument(
            "--text", type=Path, help="text for perplexity (default Wikipedia prose, fetched)"
        )
        result.add_argument("--tokens", type=int, default=5120, help="of the text (default %(default)s)")
        result.add_argument("--context", type=int, default=512, help="of a window (default %(default)s)")
    if "rows" in groups:
        help_text = "only rows whose name matches, such as '*@0.9'"
        result.add_argument("--rows", nargs="+", default=["*"], metavar="PATTERN", help=help_text)
    result.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of the results (default %(default)s)"
    )
    return result


def run(script: Callable[[argparse.Namespace], int | None], args: argparse.Namespace) -> int:
    """Run a script so that our own lines alone reach the terminal; return its exit status, 2 for bad input."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    quiet_libraries()
    try:
        return script(args) or 0
    except RkExportError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def model_of(args: argparse.Namespace) -> Path:
    """Return the model that was asked for, or the default one."""
    return Path(args.model) if args.model else assets.smollm2()


def model_name(args: argparse.Namespace) -> str:
    """Return how the results call the model."""
    return Path(args.model).name if args.model else DEFAULT_MODEL


def text_of(args: argparse.Namespace) -> EvalText:
    """Return the text that was asked for, or the default one."""
    return EvalText(args.text or assets.wiki_text("eval"), args.context, args.tokens)


def protocol(args: argparse.Namespace, text: EvalText) -> Row:
    """Return the facts of a measurement of perplexity."""
    return {
        "model": model_name(args),
        "text": text.path.name,
        "tokens": args.tokens,
        "context": args.context,
    }


def perplexity(model: Any, text: EvalText, folder: Path) -> Row:
    """Return the perplexity of a PyTorch model, and its loss in nats with the standard error over windows."""
    result = perplexity_of(torch_logits(model), text, open_source(folder).folder)
    return {"perplexity": result.perplexity, "nll": result.nll, "standard_error": result.standard_error}


def machine(device: str = "cpu") -> str:
    """Return what a row was measured on."""
    cores = f"{os.cpu_count()} CPU cores"
    return f"{torch.cuda.get_device_name()}, {cores}" if device.startswith("cuda") else cores


def model_bytes(bundle: Path) -> int:
    """Return the bytes of a bundle's model files."""
    return sum((bundle / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


def genai_builder(model: Path, out: Path) -> list[str]:
    """Return the command with which onnxruntime-genai builds an INT4 model of its own."""
    words = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    return [*words, "-i", str(model), "-o", str(out)]


def in_own_process(script: str, *words: str) -> Row:
    """Run a script that prints a row as its last line, in a fresh process: memory and buffers are its own."""
    output = subprocess.run([sys.executable, script, *words], check=True, stdout=subprocess.PIPE, text=True)
    row: Row = json.loads(output.stdout.splitlines()[-1])
    return row


class Results:
    """Rows by key in FOLDER/NAME.json, beside facts about the run.

    Args:
        folder: Of the results.
        name: Of the files.
        facts: What all rows are measured with; the versions of the libraries are added.

    Raises:
        InputError: The file holds rows that were measured with something else.
    """

    def __init__(self, folder: Path, name: str, facts: Row | None = None) -> None:
        self.folder, self.name = folder, name
        self.path = folder / f"{name}.json"
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        self.rows: Rows = found.pop("rows", {})
        given = json.loads(json.dumps(facts or {}))  # tuples become lists, as in the file
        if other := [key for key, value in given.items() if found.get(key, value) != value]:
            raise InputError(
                f"holds rows that were measured with other {', '.join(other)}",
                where=str(self.path),
                fix="give another --out",
            )
        self.facts: Row = {**found, **given}

    def measure(
        self, wanted: Iterable[tuple[str, Measure]], patterns: Sequence[str] = ("*",), until: float = math.inf
    ) -> bool:
        """Measure the rows that are missing and save after each; return False where `time.monotonic` passed `until`."""
        for key, measure in wanted:
            if key in self.rows or not any(fnmatch(key, pattern) for pattern in patterns):
                continue
            if time.monotonic() > until:
                return False
            start = time.monotonic()
            row = measure()
            self.rows[key] = {"seconds": round(time.monotonic() - start, 1), **row}
            self.facts["versions"] = library_versions()
            self.save()
            logger.info("%s: %s", key, _numbers(self.rows[key]))
        return True

    def save(self) -> None:
        """Write the JSON file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.facts, "rows": self.rows}, indent=1)
        self.path.write_text(f"{text}\n", encoding="utf-8")

    def write_page(self, text: str) -> None:
        """Write the Markdown page that reads the rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{self.name}.md").write_text(text, encoding="utf-8")

    def ordered(self, keys: Iterable[str]) -> Rows:
        """Return the rows that are there in the order of some keys."""
        return {key: self.rows[key] for key in keys if key in self.rows}


def _numbers(row: Row) -> Row:
    return {name: float(short(value)) for name, value in row.items() if isinstance(value, float)}


def table(head: Sequence[str], lines: Iterable[Sequence[object]], rule: str = "") -> str:
    """Return a Markdown table; `rule` has an `r` for each column that is aligned on the right."""
    marks = ["---:" if mark == "r" else "---" for mark in rule.ljust(len(head))]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (head, marks, *lines))


def reading(lines: Iterable[str]) -> str:
    """Return the section that says what the rows show."""
    return "\n\n".join(["## Reading", "\n".join(f"- {line}" for line in lines) or "- Too few rows yet."])


def short(value: float | None) -> str:
    """Return a number with four digits."""
    return "" if value is None else f"{value:.4g}"


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that draws: it runs in one style, whatever the user's own settings are."""

    @functools.wraps(draw)
    def with_style(*args: P.args, **kwargs: P.kwargs) -> T:
        defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
        with matplotlib.rc_context({**defaults, **_STYLE}):
            return draw(*args, **kwargs)

    return with_style


def new_figure(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, Any]:
    """Return a figure and its panels, an array (rows, columns); `height` in inches."""
    figure = Figure(figsize=(10, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


@styled
def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, the same bytes every time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None, "Creator": None}, facecolor="white")


def legend(panel: Any, **options: Any) -> None:
    """Draw a legend where anything is named."""
    if panel.get_legend_handles_labels()[0]:
        panel.legend(**{"fontsize": 7, **options})

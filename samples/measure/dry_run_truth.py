"""Compare what a dry run says of each stage with what the run then takes. It needs Linux.

    python samples/measure/shapes.py 0.5b /tmp/shape05
    python samples/measure/dry_run_truth.py /tmp/shape05 --save docs/results/dry_run.json

For each folder: `compress --dry-run --json`, then the run itself under the meter of `memory_meter.py`, with a cache of
its own that is empty before. A ratio is measured over predicted. Memory is RssAnon of all processes; disk is work
folder, cache and output, with the files that have no name any more; time is that of the clock, so let nothing else run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness, memory_meter

COMMAND = (sys.executable, "-c", "import sys; from rk_export.cli.main import main; sys.exit(main())")
# Within these factors a prediction is called true.
BOUNDS = {"memory": 1.25, "disk": 1.25, "seconds": 2.0}
_NOTHING = 1_000_000
_MEASURED = {"memory": "anon", "disk": "disk", "seconds": "seconds"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, nargs="+", help="folders of models")
    parser.add_argument("--words", nargs="*", default=[], metavar="WORD", help="more words for compress")
    parser.add_argument("--work", type=Path, help="where outputs and caches go (default a temporary folder)")
    parser.add_argument("--save", type=Path, metavar="FILE", help="add the figures to this JSON file")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure, print a table a model, and save after each."""
    found: dict[str, Any] = {}
    if args.save is not None and args.save.is_file():
        found = json.loads(args.save.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as own:
        for model in args.models:
            rows = compared(model, args.words, (args.work or Path(own)) / model.name)
            print(f"\n{model.name}\n\n{table(rows)}")
            found[" ".join([model.name, *args.words])] = rows
            if args.save is not None:
                args.save.write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")


def compared(model: Path, words: Sequence[str], folder: Path) -> list[harness.Row]:
    """Return a row a stage, and one of the whole run: predicted, measured, and their ratio.

    Args:
        model: The model.
        words: More words for `compress`.
        folder: Where the output and the cache go; both are deleted before and after.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    out, cache = folder / "out", folder / "cache"
    environment = {**os.environ, "RK_EXPORT_CACHE": str(cache)}
    command = [*COMMAND, "compress", str(model), "-o", str(out), *words]
    said = subprocess.run(
        [*command, "--dry-run", "--json", "--quiet"], env=environment, check=True, capture_output=True
    )
    metered = memory_meter.metered(command, [out, cache], env=environment)
    if metered.status:
        raise RuntimeError(f"compress ended with {metered.status}")
    shutil.rmtree(folder)
    return rows_of(json.loads(said.stdout), metered)


def rows_of(predicted: dict[str, Any], metered: memory_meter.Metered) -> list[harness.Row]:
    """Return a row for each stage that both know, and one for the whole run."""
    usages = {usage.stage: replace(usage) for usage in metered.stages}
    stages = {stage["stage"]: stage for stage in predicted["stages"]}
    # What runs before the first line of the log are the imports of the first stage.
    if memory_meter.BEFORE in usages and "load" in usages:
        usages["load"].add(usages.pop(memory_meter.BEFORE))
    rows = [_row(name, stages[name], usage) for name, usage in usages.items() if name in stages]
    whole = {
        "memory": max(stage["memory"] for stage in predicted["stages"]),
        "disk": max(stage["disk"] for stage in predicted["stages"]),
        "seconds": predicted["seconds"],
    }
    return [*rows, _row("whole run", whole, metered.whole)]


def _row(name: str, predicted: dict[str, Any], measured: memory_meter.Usage) -> harness.Row:
    row: harness.Row = {"stage": name}
    for kind, field in _MEASURED.items():
        value = getattr(measured, field)
        row |= {f"{kind}_predicted": predicted[kind], f"{kind}_measured": value}
        row[f"{kind}_ratio"] = value / predicted[kind] if predicted[kind] else None
    return row


def is_true(row: harness.Row, kind: str) -> bool:
    """Whether a prediction is within its bound; one of nothing is, where less than a megabyte was measured."""
    ratio = row[f"{kind}_ratio"]
    if ratio is None:
        return bool(row[f"{kind}_measured"] < _NOTHING)
    return 1 / BOUNDS[kind] <= ratio <= BOUNDS[kind]


def table(rows: Sequence[harness.Row]) -> str:
    """Return predicted and measured figures as Markdown; a star marks what is out of its bound."""
    head = ["stage"]
    for kind, unit in (("memory", "MB"), ("disk", "MB"), ("seconds", "s")):
        head += [f"{kind} predicted, {unit}", "measured", "ratio"]
    return harness.table(head, map(_cells, rows), "-" + "rrr" * 3)


def _cells(row: harness.Row) -> list[str]:
    cells = [str(row["stage"])]
    for kind, unit in (("memory", 1e6), ("disk", 1e6), ("seconds", 1.0)):
        ratio = row[f"{kind}_ratio"]
        values = (f"{row[f'{kind}_{which}'] / unit:,.0f}" for which in ("predicted", "measured"))
        shown = "" if ratio is None else f"{ratio:.2f}"
        cells += [*values, shown + ("" if is_true(row, kind) else " *")]
    return cells


if __name__ == "__main__":
    sys.exit(main())

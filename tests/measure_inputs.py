"""What becomes of inputs as people bring them: every case is made, read, and compared with transformers.

    python tests/measure_inputs.py                       every case
    python tests/measure_inputs.py --case 'GPTQ*' AWQ    some of them; the rows of the others stay

Writes ``docs/results/inputs.json``, one row a case, and ``inputs.md`` from it. Ends with status 1 if a case does not
end as expected, or if its logits differ from transformers' by more than 1e-4 of the largest.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from input_cases import CASES
from input_cases.case import TOLERANCE, Case, Row, run_case
from transformers.utils import logging as transformers_logging

from rk_export.cli.main import quiet_libraries
from rk_export.manifest import library_versions

RESULTS = Path(__file__).parents[1] / "docs" / "results"
SOURCES = ("safetensors", "peft", "compressed-tensors", "bitsandbytes", "gguf")

logger = logging.getLogger("inputs")


def measure(cases: Iterable[Case]) -> tuple[list[Row], list[str]]:
    """Run cases; return their rows, and what is wrong with them."""
    rows, wrong = [], []
    for case in cases:
        with TemporaryDirectory() as folder:
            try:
                row = run_case(case, Path(folder))
            except Exception as error:  # a case that breaks must not hide the others
                wrong.append(f"{case.name}: {type(error).__name__}: {error}")
                logger.error("%s", wrong[-1])
                continue
        rows.append(row)
        wrong += faults(case, row)
        error = "" if row.error is None else f", error {row.error:.1e}"
        logger.info("%s: %s%s", case.name, row.outcome, error)
    return rows, wrong


def faults(case: Case, row: Row) -> list[str]:
    """Return what is wrong with the row of a case."""
    if row.outcome != case.outcome:
        return [f"{case.name}: {row.outcome}, not {case.outcome}: {row.message}"]
    if row.error is not None and not row.error <= TOLERANCE:
        return [f"{case.name}: its logits differ by {row.error:.1e} of the largest"]
    return []


def save(rows: Sequence[Row], folder: Path) -> None:
    """Write the results, in the order of the cases; rows of cases that are gone are dropped."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "inputs.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    by_name = {row["case"]: row for row in known} | {row.case: asdict(row) for row in rows}
    ordered = [by_name[case.name] for case in CASES if case.name in by_name]
    data = {"versions": versions(), "rows": ordered}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "inputs.md").write_text(page(data), encoding="utf-8")


def versions() -> dict[str, str]:
    """Return the versions of the libraries that write, read and compute the cases."""
    from importlib.metadata import version

    return library_versions() | {name: version(name) for name in SOURCES}


def page(data: dict[str, Any]) -> str:
    """Return the results as a page."""
    rows = data["rows"]
    counts = Counter(row["outcome"] for row in rows)
    largest = max((row["error"] or 0.0 for row in rows), default=0.0)
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    lines = [
        "# Inputs as people bring them",
        "",
        "This page lists models as people bring them, and the outcome for each. The [list of",
        "inputs](../reference/inputs.md) says how to fix a model that is refused.",
        "",
        f"There are {len(rows)} cases: {outcomes}. No logit differs by more than {largest:.1e} of the largest. Every",
        "refusal came as a message before any work began. No code of an input was run.",
        "",
        "The models are tiny and random. They are exported in floats on one thread of the CPU, unless the command says",
        "otherwise. *Error* is the largest difference of a logit over the largest logit, in ONNX Runtime against a",
        "reference:",
        "",
        "- The reference is transformers (float32, eager attention).",
        "- For an adapter it is PEFT's merged model.",
        "- For a quantized source it is the model with the values that its codes stand for.",
        "",
        "*Tokens* counts greedy tokens where they are compared. All of them equal transformers'. *Message* quotes the",
        "program word by word. Made by `make inputs`, or `python tests/measure_inputs.py`.",
        "",
        "| case | input | command | outcome | error | tokens | message |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_line(row) for row in rows),
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in data["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    error = "" if row["error"] is None else f"{row['error']:.1e}"
    tokens = "" if row["tokens"] is None else str(row["tokens"])
    cells = (row["case"], row["input"], row["command"], row["outcome"], error, tokens, row["message"])
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the cases that are asked for and write the results."""
    parser = argparse.ArgumentParser(description="Measure what becomes of inputs as people bring them.")
    parser.add_argument("--case", nargs="+", default=["*"], help="patterns of the cases' names")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    quiet_libraries()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(1)
    rows, wrong = measure(
        case for case in CASES if any(fnmatch(case.name, pattern) for pattern in options.case)
    )
    save(rows, options.output)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())

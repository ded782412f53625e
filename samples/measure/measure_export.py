"""Time and extra memory of the export alone: rewritten PyTorch model -> model.onnx with its external data.

    python samples/measure/measure_export.py        SmolLM2-135M-Instruct, floats and INT4

Writes docs/results/export.json and export.md.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Results, Row

from rk_export import CalibrationOptions, Factorize, Quantize, Recipe, open_source, rewrite_model
from rk_export.graph.build import build_graph, save_graph

# The steps after the factorization.
FORMATS: dict[str, tuple[Quantize, ...]] = {
    "float32": (),
    "INT4": (Quantize(("all",), bits=4, quantizer="rtn"),),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each format in a process of its own, write JSON and Markdown."""
    parser = harness.parser(__doc__, "model", "rows")
    parser.add_argument("--one", choices=FORMATS, help=argparse.SUPPRESS)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure one format in this process, or every format that is missing in processes of their own."""
    model = harness.model_of(args)
    if args.one:
        print(json.dumps(measure(model, args.one)))
        return
    results = Results(args.out, "export", {"model": harness.model_name(args)})
    one = partial(harness.in_own_process, __file__, "--model", str(model), "--one")
    results.measure([(name, partial(one, name)) for name in FORMATS], args.rows)
    results.write_page(page(results))


def measure(model: Path, name: str) -> Row:
    """Return seconds, extra peak memory, and bytes of the dense model in fp32 and of the exported files."""
    steps = (Factorize(("qk",), keep=0.95), *FORMATS[name])
    rewritten = rewrite_model(model, Recipe(steps, CalibrationOptions("none")))
    before = peak_bytes()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        graph, _ = build_graph(rewritten)
        save_graph(graph, Path(folder))
        seconds = time.perf_counter() - start
        files = sum(path.stat().st_size for path in Path(folder).iterdir())
    return {
        "seconds": seconds,
        "extra_peak_bytes": peak_bytes() - before,
        "fp32_bytes": 4 * open_source(model).parameter_count(),
        "file_bytes": files,
    }


def peak_bytes() -> int:
    """Return the largest resident size that this process ever had, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def page(results: Results) -> str:
    """Return the figures as a page."""
    lines = [
        (
            *(name, f"{row['seconds']:.1f} s", extra_memory(row)),
            f"{row['file_bytes'] / 1e6:.1f} MB",
        )
        for name, row in results.rows.items()
    ]
    return "\n".join(
        [
            "# Export: time and memory",
            "",
            "This page shows how long it takes to turn a rewritten PyTorch model into files, and how much memory that "
            "needs.",
            "",
            "Made by `python samples/measure/measure_export.py` with SmolLM2-135M-Instruct, q and k factorized at "
            "kept ratio 0.95. *Extra peak memory* is the growth of the process's peak resident size. Memory that "
            "loading and rewriting the model had needed already does not count.",
            "",
            harness.table(["weights", "time", "extra peak memory", "files"], lines),
            "",
        ]
    )


def extra_memory(row: Row) -> str:
    """Return the extra memory of a row in words."""
    extra = row["extra_peak_bytes"]
    return f"{extra / 1e6:.0f} MB ({extra / row['fp32_bytes']:.2f} of fp32)"


if __name__ == "__main__":
    sys.exit(main())

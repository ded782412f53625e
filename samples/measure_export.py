"""Time and extra memory of the export alone: rewritten PyTorch model -> model.onnx with its external data.

python samples/measure_export.py                # SmolLM2-135M-Instruct, floats and INT4; writes docs/results
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rk_export import CompressOptions, QuantSpec
from rk_export.evaluation.assets import smollm2
from rk_export.graph.build import build_graph, save_graph
from rk_export.options.calibration import CalibrationOptions
from rk_export.planning.planner import make_plan
from rk_export.rewrite.apply import rewrite
from rk_export.source.stored import open_source

FORMATS = {"float32": None, "INT4": QuantSpec(4, 32)}


def main() -> None:
    """Measure each format in a process of its own, write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="HF folder (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--one", choices=FORMATS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.model or smollm2()
    if args.one:
        print(json.dumps(measure(model, args.one)))
        return
    rows = {}
    for name in FORMATS:
        command = [sys.executable, __file__, "--model", str(model), "--one", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        rows[name] = json.loads(output.splitlines()[-1])
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "export.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (args.results / "export.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


def measure(model: Path, name: str) -> dict[str, float]:
    """Return seconds, extra peak memory, and bytes of the dense model in fp32 and of the exported files."""
    source = open_source(model)
    options = CompressOptions(
        groups=("qk",),
        quant=FORMATS[name],
        embedding_quant=FORMATS[name],
        calibration=CalibrationOptions("none"),
        quantizer="rtn",
    )
    rewritten = rewrite(source, make_plan(source, options))
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
        "fp32_bytes": 4 * source.parameter_count(),
        "file_bytes": files,
    }


def peak_bytes() -> int:
    """Return the largest resident size that this process ever had, in bytes."""
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """Return the figures as a page."""
    lines = [
        f"| {name} | {row['seconds']:.1f} s | {row['extra_peak_bytes'] / 1e6:.0f} MB "
        f"({row['extra_peak_bytes'] / row['fp32_bytes']:.2f} of fp32) | {row['file_bytes'] / 1e6:.1f} MB |"
        for name, row in rows.items()
    ]
    head = [
        "# Export: time and memory",
        "",
        "`python samples/measure_export.py`: SmolLM2-135M-Instruct, q/k factorized at kept ratio 0.95, from the",
        "rewritten PyTorch model to files. Extra memory is the growth of the process's peak resident size: what the",
        "export needs beyond what loading and rewriting the model had needed already.",
        "",
        "| weights | time | extra peak memory | files |",
        "| --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *lines, ""])


if __name__ == "__main__":
    main()

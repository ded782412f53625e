"""Time of a quantized matrix product in ONNX Runtime on CPU, by bits, block size and zero points.

python samples/measure/time_formats.py        writes docs/results/formats.json and formats.md; a minute

A graph is a chain of products of the shapes of SmolLM2's FFN, at accuracy level 4 as it is exported. Formats take
turns on one thread, and the quickest run of each counts. Processor time is measured, not time on the clock, so that
other work on the machine hardly matters.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Results, Row

from rk_export import QuantSpec

WIDTH, INNER, PAIRS = 576, 1536, 24
PLAIN = QuantSpec(4, 32)
FORMATS = (
    *(QuantSpec(4, block, symmetric) for block in (16, 32, 64, 128) for symmetric in (True, False)),
    *(QuantSpec(8, block) for block in (16, 32, 64, 128)),
    *(QuantSpec(2, block, symmetric=False) for block in (16, 32, 64)),
)
PHASES = {"decode": (1, 40), "prefill": (256, 3)}  # tokens at once, and turns


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every format; write JSON and Markdown."""
    return harness.run(script, harness.parser(__doc__, "rows").parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Time one token and many."""
    results = Results(args.out, "formats", {"shapes": [WIDTH, INNER], "products": 2 * PAIRS})
    results.measure([(phase, lambda phase=phase: measure(*PHASES[phase])) for phase in PHASES], args.rows)
    results.write_page(page(results))


def measure(tokens: int, turns: int) -> Row:
    """Return the milliseconds of the whole chain in every format."""
    sessions = {title(spec): session(spec) for spec in FORMATS}
    x = np.random.default_rng(0).standard_normal((tokens, WIDTH), np.float32)
    quickest = dict.fromkeys(sessions, np.inf)
    for _ in range(turns):
        for name, one in sessions.items():
            start = time.thread_time()
            one.run(None, {"x": x})
            quickest[name] = min(quickest[name], 1e3 * (time.thread_time() - start))
    return {name: round(value, 3) for name, value in quickest.items()}


def title(spec: QuantSpec) -> str:
    """Return a format in a few words."""
    return f"INT{spec.bits} block {spec.block_size}{'' if spec.symmetric else ' with zero points'}"


def session(spec: QuantSpec) -> ort.InferenceSession:
    """Return a session of a chain of products that go up and down between the two widths."""
    generator, value, nodes = np.random.default_rng(0), "x", []
    tensors: dict[str, NDArray[Any]] = {}
    for index in range(2 * PAIRS):
        columns, rows = (WIDTH, INNER) if index % 2 == 0 else (INNER, WIDTH)
        own = {f"{name}{index}": array for name, array in stored(rows, columns, spec, generator).items()}
        sizes = {"K": columns, "N": rows, "bits": spec.bits, "block_size": spec.block_size}
        output = "y" if index == 2 * PAIRS - 1 else f"y{index}"
        node = helper.make_node(
            "MatMulNBits", [value, *own], [output], domain="com.microsoft", accuracy_level=4, **sizes
        )
        nodes.append(node)
        tensors |= own
        value = output
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["tokens", WIDTH]) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def stored(
    rows: int, columns: int, spec: QuantSpec, generator: np.random.Generator
) -> dict[str, NDArray[Any]]:
    """Return codes, scales and zero points of a random matrix."""
    blocks = -(-columns // spec.block_size)
    packed = (rows, blocks, spec.block_size * spec.bits // 8)
    tensors: dict[str, NDArray[Any]] = {
        "codes": generator.integers(0, 256, packed, np.uint8),
        "scales": np.full((rows, blocks), 2e-3, np.float32),
    }
    if not spec.symmetric:
        tensors["zeros"] = generator.integers(0, 256, (rows, -(-blocks * spec.bits // 8)), np.uint8)
    return tensors


def page(results: Results) -> str:
    """Return the times as a page, relative to plain INT4."""
    rows = results.ordered(PHASES)
    lines = [
        [name, *(f"{row[name]:.2f} | {row[name] / row[title(PLAIN)]:.2f}" for row in rows.values())]
        for name in map(title, FORMATS)
    ]
    head = ["format", *(f"{phase}, ms | ratio" for phase in rows)]
    return "\n".join(
        [
            "# Time of quantized products by format",
            "",
            f"The table shows what {2 * PAIRS} matrix products cost in each format. Their shapes are "
            f"({INNER}, {WIDTH}) and ({WIDTH}, {INNER}).",
            "They ran in ONNX Runtime on a CPU, at accuracy level 4, on one thread. The time is processor time, of the "
            "quickest of several turns.",
            f"The ratio is to {title(PLAIN)}. Decode is one token, prefill 256. Made by "
            "`python samples/measure/time_formats.py`.",
            "",
            harness.table(" | ".join(head).split(" | "), lines, "-" + "r" * 2 * len(rows)),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

"""Time of choosing one token from logits, by size of vocabulary, shape of the distribution and options.

python samples/measure/bench_sampling.py        writes docs/results/sampling.json and sampling.md
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Measure, Results, Row, Rows

from rk_export.runtime import GenerationOptions
from rk_export.runtime.sampling import Sampler

VOCABULARIES = (49_152, 151_936, 262_144)
PROMPT_TOKENS = 4096
OPTIONS = {
    "greedy": GenerationOptions(),
    "temperature": GenerationOptions(temperature=0.8, seed=0),
    "top-k 50": GenerationOptions(temperature=0.8, top_k=50, seed=0),
    "top-p 0.9": GenerationOptions(temperature=0.8, top_p=0.9, seed=0),
    "min-p 0.05": GenerationOptions(temperature=0.8, min_p=0.05, seed=0),
    "all three and a repetition penalty": GenerationOptions(
        temperature=0.8, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1, seed=0
    ),
}
SHAPES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "peaked": lambda rng, size: rng.normal(size=size) * 2.5 + 18 * (rng.random(size) < 1e-4),
    "flat": lambda rng, size: rng.normal(size=size),
    "all equal": lambda _, size: np.zeros(size),
}


def wanted(repeats: int) -> Iterator[tuple[str, Measure]]:
    """Yield every combination."""
    for size in VOCABULARIES:
        for shape in SHAPES:
            for name in OPTIONS:
                yield f"{name}, {shape}, {size}", partial(measure, size, shape, name, repeats)


def measure(size: int, shape: str, name: str, repeats: int) -> Row:
    """Return the milliseconds of one choice: the smallest and the median of many."""
    rng = np.random.default_rng(0)
    logits = SHAPES[shape](rng, size).astype(np.float32)
    sampler = Sampler(OPTIONS[name], rng.integers(size, size=PROMPT_TOKENS).tolist())
    sampler.choose(logits)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        sampler.choose(logits)
        times.append(1e3 * (time.perf_counter() - start))
    least, middle = round(min(times), 4), round(median(times), 4)
    return {"vocabulary": size, "logits": shape, "options": name, "least_ms": least, "median_ms": middle}


def page(results: Results) -> str:
    """Return the table that docs/results shows: the slowest shape of logits of each vocabulary and set of options."""
    lines = [(name, *(slowest(results.rows, name, size) for size in VOCABULARIES)) for name in OPTIONS]
    return "\n".join(
        [
            "# Sampling: time of one token",
            "",
            "This page shows how long our runtime takes to choose one token from the logits.",
            "",
            "Made by `OMP_NUM_THREADS=1 python samples/measure/bench_sampling.py`. A cell holds milliseconds on one "
            f"core: the least and the median of {results.facts['repeats']} calls. The logits are peaked (as a "
            "language model's), flat or all equal. A cell shows the slowest of the three. The repetition penalty "
            f"covers a prompt of {PROMPT_TOKENS} tokens. Other work on the machine raises the medians.",
            "",
            harness.table(["options", *(f"{size:,} tokens" for size in VOCABULARIES)], lines),
            "",
        ]
    )


def slowest(rows: Rows, name: str, size: int) -> str:
    """Return least and median milliseconds of the slowest shape of logits."""
    of_cell = [row for row in rows.values() if (row["options"], row["vocabulary"]) == (name, size)]
    least, middle = (max(row[key] for row in of_cell) for key in ("least_ms", "median_ms"))
    return f"{least:.2f} / {middle:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the combinations that are missing."""
    parser = harness.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=200)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    results = Results(args.out, "sampling", {"repeats": args.repeats})
    results.measure(wanted(args.repeats))
    results.write_page(page(results))


if __name__ == "__main__":
    sys.exit(main())

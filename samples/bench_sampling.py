"""Time of choosing one token from logits, by size of vocabulary, shape of the distribution and options.

python samples/bench_sampling.py                # writes docs/results/sampling.json and sampling.md
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

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


def main() -> None:
    """Measure every combination, write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--repeats", type=int, default=200)
    args = parser.parse_args()
    rows = [
        measure(size, shape, name, args.repeats)
        for size in VOCABULARIES
        for shape in SHAPES
        for name in OPTIONS
    ]
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "sampling.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    (args.results / "sampling.md").write_text(markdown(rows, args.repeats), encoding="utf-8")
    print(markdown(rows, args.repeats))


def measure(size: int, shape: str, name: str, repeats: int) -> dict[str, object]:
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
    return {
        "vocabulary": size,
        "logits": shape,
        "options": name,
        "least_ms": round(min(times), 4),
        "median_ms": round(median(times), 4),
    }


def markdown(rows: list[dict[str, object]], repeats: int) -> str:
    """Return the table that docs/results shows: the slowest shape of logits of each vocabulary and set of options."""
    lines = [
        "# Sampling: time of one token",
        "",
        "`OMP_NUM_THREADS=1 python samples/bench_sampling.py`: milliseconds on one core to choose a token, least",
        f"and median of {repeats}. The logits are peaked (as a language model's), flat or all equal; each cell is the",
        f"slowest of the three. The repetition penalty covers a prompt of {PROMPT_TOKENS} tokens. Other work on the",
        "machine raises the medians.",
        "",
        "| options | " + " | ".join(f"{size:,} tokens" for size in VOCABULARIES) + " |",
        "| --- |" + " --- |" * len(VOCABULARIES),
    ]
    for name in OPTIONS:
        cells = [_slowest(rows, name, size) for size in VOCABULARIES]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _slowest(rows: list[dict[str, object]], name: str, size: int) -> str:
    of_cell = [row for row in rows if row["options"] == name and row["vocabulary"] == size]
    least, middle = (max(float(str(row[key])) for row in of_cell) for key in ("least_ms", "median_ms"))
    return f"{least:.2f} / {middle:.2f}"


if __name__ == "__main__":
    main()

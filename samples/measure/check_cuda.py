"""What only a machine with a CUDA device can show: compression on the GPU, parity and speed of the CUDA provider.

    python samples/measure/check_cuda.py                    SmolLM2-135M-Instruct; writes docs/results/cuda.json
    python samples/measure/check_cuda.py --model DIR --out /tmp/results

Each bundle is compressed on the GPU, verified on the CUDA execution provider (every parity tier), timed there,
and compared with the same plan applied on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Results, Row

from rk_export import Budget, ParityError, Prepare, Quantize, Recipe, Run, Target, compress
from rk_export.runtime import bench

TABLES = ("embed_tokens", "lm_head")
BUNDLES: dict[str, Recipe] = {
    "fp16 dense": Recipe.load("floats"),
    "INT8 dense": Recipe((Prepare(), Quantize(("all",), bits=8, block=64))),
    "INT4 dense": Recipe(
        (Prepare(), Quantize(("layers",), bits=4, block=64), Quantize(TABLES, bits=8, block=64))
    ),
    "fp16 kept 0.9": Recipe.load("floats").with_budget(Budget("keep", 0.9)),
    "100 MB": Recipe.load("default").with_budget(Budget("size", 100e6)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every bundle and write what was found."""
    parser = harness.parser(__doc__, "model", "rows")
    parser.add_argument("--work", type=Path, default=Path("out/cuda"), help="folder of bundles")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Check the bundles that are missing."""
    model = harness.model_of(args)
    facts = {"model": harness.model_name(args), "device": torch.cuda.get_device_name()}
    results = Results(args.out, "cuda", facts)
    rows = [
        (name, partial(check, model, args.work / name.replace(" ", "-"), options))
        for name, options in BUNDLES.items()
    ]
    results.measure(rows, args.rows)


def check(model: Path, bundle: Path, recipe: Recipe) -> Row:
    """Compress on the GPU, verify and time on the CUDA provider; a tier out of its bound is written down."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        report = compress(model, bundle, recipe, target=Target("cuda"), run=Run(device="cuda"), force=True)
    except ParityError as error:
        return {"failed": str(error)}
    row = bench([bundle], provider="cuda").rows[0]
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "stages": {stage: round(seconds, 2) for stage, seconds in report.timings.items()},
        "peak_gpu_bytes": torch.cuda.max_memory_allocated(),
        "file_bytes": report.size.file_bytes if report.size else None,
        "parity": {tier.tier: [tier.relative_error, tier.bound, tier.passed] for tier in report.parity},
        "prefill": round(row.prefill_median, 1),
        "decode": round(row.decode_median, 1),
    }


if __name__ == "__main__":
    sys.exit(main())

"""What only a machine with a CUDA device can show: compression on the GPU, parity and speed of the CUDA provider.

    python samples/gpu/check_cuda.py                    SmolLM2-135M-Instruct; writes docs/results/cuda.json
    python samples/gpu/check_cuda.py --model DIR --results /tmp/results

Each bundle is compressed on the GPU, verified on the CUDA execution provider (every parity tier), timed there,
and compared with the same plan applied on the CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rk_export import CompressOptions, QuantSpec, compress
from rk_export.cli.main import quiet_libraries
from rk_export.errors import ParityError
from rk_export.evaluation.assets import smollm2
from rk_export.folders import library_versions
from rk_export.options.ranks import Budget
from rk_export.runtime import bench

BUNDLES: dict[str, CompressOptions] = {
    "fp16 dense": CompressOptions(groups=(), quant=None, embedding_quant=None),
    "INT8 dense": CompressOptions(groups=(), quant=QuantSpec(8, 64), embedding_quant=QuantSpec(8, 64)),
    "INT4 dense": CompressOptions(groups=(), quant=QuantSpec(4, 64), embedding_quant=QuantSpec(8, 64)),
    "fp16 kept 0.9": CompressOptions(budget=Budget("keep", 0.9), quant=None, embedding_quant=None),
    "100 MB": CompressOptions(budget=Budget("size", 100e6)),
}


def main() -> None:
    """Check every bundle and write what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="HF folder (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--work", type=Path, default=Path("out/cuda"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    quiet_libraries()
    args.results.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": library_versions(),
        "bundles": {},
    }
    for name, options in BUNDLES.items():
        bundle = args.work / name.replace(" ", "-")
        found["bundles"][name] = check(args.model or smollm2(), bundle, options)
        (args.results / "cuda.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(found["bundles"][name]), flush=True)


def check(model: Path, bundle: Path, options: CompressOptions) -> dict[str, Any]:
    """Compress on the GPU, verify and time on the CUDA provider; a tier out of its bound is written down."""
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        report = compress(model, bundle, replace(options, ep="cuda", device="cuda"), force=True)
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
    main()

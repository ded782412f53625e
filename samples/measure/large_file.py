"""A bundle whose external data is larger than 4 GB: written, verified and run.

    python samples/measure/large_file.py WORK [--layers 6]

Writes some layers of LLaMA-7B's shape with random weights into the folder WORK, exports them in floats, checks the size
of the data file and generates from it. It is in no gate: six layers take 12 GB of disk, and ONNX Runtime holds the
matrices in memory.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import shapes

import rk_export

LARGEST_OF_32_BITS = 1 << 32


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model, export it, and say how large its file is and what it generates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    model = given.work / "model"
    if not model.exists():
        shapes.write(model, "7b", layers=given.layers)
    bundle = given.work / "bundle"
    report = rk_export.export(model, bundle, force=True)
    for tier in report.parity:
        sys.stdout.write(f"tier {tier.tier}: {tier.relative_error} passed {tier.passed}\n")
    size = (bundle / "model.onnx.data").stat().st_size
    session = rk_export.Session.from_pretrained(bundle, provider="cpu")
    options = rk_export.GenerationOptions(max_new_tokens=8)
    (row,) = session.generate([3, 4, 5], options=options)
    sys.stdout.write(
        f"data file {size:,} bytes, generated {row.token_ids}, {time.perf_counter() - start:.0f} s\n"
    )
    return 0 if size > LARGEST_OF_32_BITS else 1


if __name__ == "__main__":
    sys.exit(main())

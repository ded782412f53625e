"""Global rank and sparsity optimization (2505.03801) against its parts and against pruning, by perplexity.

For each kept share of the linear layers' parameters: CAP as published (policy gradient), what its search starts
from, low rank alone, our allocation over mixtures that are fitted anew, SSLC (2510.26446) under one allocation with
refitted entries, and pruning by magnitude and by Wanda (2306.11695). All methods that use data see the same
calibration text. Nothing is quantized or exported: matrices are replaced in the PyTorch model, which is evaluated.

    python samples/papers/cap/main.py                      all rows that are not in the results yet
    python samples/papers/cap/main.py --rows 'policy@*'    some of them

Writes cap.json, cap.md, cap.svg and cap_allocation.svg into docs/results. Pools, statistics and the policy's states are
cached besides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script

from assets import wiki_text
from measure import harness
from measure.harness import Results
from papers.cap.report import write
from papers.cap.workshop import KEPT, Workshop, wanted

from rk_export import CalibrationOptions, CapOptions, TextFile, open_source

PROTOCOL = ("iterations", "steps", "learning_rate", "window", "batch_tokens", "seed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the rows that are missing."""
    parser = harness.parser(__doc__, "model", "text", "rows")
    parser.add_argument("--calibration", type=Path, help="calibration text (default other Wikipedia prose)")
    parser.add_argument("--calibration-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=100, help="of the policy")
    parser.add_argument("--batch-tokens", type=int, default=1024, help="of a step")
    parser.add_argument("--device", default="cpu")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    corpus, text = args.calibration or wiki_text("calib"), harness.text_of(args)
    options = CapOptions(keep=min(KEPT), steps=args.steps, batch_tokens=args.batch_tokens)
    model = harness.model_of(args)
    workshop = Workshop(
        model,
        open_source(model),
        CalibrationOptions(TextFile.of(corpus), args.calibration_tokens),
        options,
        text,
        torch.device(args.device),
    )
    facts = {
        **harness.protocol(args, text),
        "calibration": f"{args.calibration_tokens} tokens of {Path(corpus).name}",
        "cap": {name: asdict(options)[name] for name in PROTOCOL},
    }
    results = Results(args.out, "cap", facts)
    results.measure([(key, partial(workshop.measure, *row)) for key, *row in wanted()], args.rows)
    write(results)


if __name__ == "__main__":
    sys.exit(main())

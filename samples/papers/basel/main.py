"""Basis selection for a target task (Basel, 2405.15877) against plain truncation, by one command.

Rows that are in ``basel.json`` already are not measured again, and a training that was interrupted goes on where it
stood, so the command may be stopped and started at any time.

    python samples/papers/basel/main.py                               every row; writes docs/results/basel.{json,md,svg}
    python samples/papers/basel/main.py --rows 'dense' 'svd-*'
    python samples/papers/basel/main.py --model DIR --out /tmp/results --device cuda

Targets are arithmetic (GSM8K questions with solutions) and code (HumanEval and MBPP functions with descriptions). Every
model is judged on held-out items of both and on Wikipedia prose, which says what is lost outside the target.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script

from assets import wiki_text
from measure import harness
from measure.harness import Results
from papers.basel.comparison import CONTEXT, TOKENS, Comparison
from papers.basel.report import draw, page
from papers.basel.task_texts import code_text, gsm8k_text

from rk_export.device import matmul_dtype, resolve_device

TEXTS = {"arithmetic": gsm8k_text, "code": code_text}
STEPS = 60
LEARNING_RATE = 1e-2


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the results."""
    parser = harness.parser(__doc__, "model", "rows")
    parser.add_argument("--work", type=Path, default=Path("out/basel"), help="states of trainings")
    parser.add_argument("--steps", type=int, default=STEPS, help="of one basis selection")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--device", default="cpu")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    held_out = {name: text("eval") for name, text in TEXTS.items()} | {"wiki": wiki_text("eval")}
    training = {name: text("train") for name, text in TEXTS.items()}
    comparison = Comparison(
        harness.model_of(args),
        args.work,
        resolve_device(args.device),
        args.steps,
        args.learning_rate,
        held_out,
        training,
    )
    products = str(matmul_dtype(torch.device("cpu"))).removeprefix("torch.")
    facts = {"model": harness.model_name(args), "tokens": TOKENS, "context": CONTEXT, "products": products}
    results = Results(args.out, "basel", facts)
    results.measure(comparison.rows(), args.rows)
    results.write_page(page(results))
    draw(results.rows, args.out / "basel.svg")


if __name__ == "__main__":
    sys.exit(main())

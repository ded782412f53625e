"""What does a size cost? Plans for several file sizes, before any model is written; then one of them is applied.

    python samples/plan_a_size.py MODEL OUT --megabytes 80 90 110
    python samples/plan_a_size.py MODEL OUT --megabytes 80 90 110 --apply 90

A plan says what happens to every matrix. The first one takes longest: the model writes its own calibration text, and
statistics are taken on it. The others, and `--apply`, find both on disk.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from rk_export import Budget, Plan, Recipe, compress, make_plan, parity_text


def main(arguments: list[str] | None = None) -> None:
    """Make a plan for each size, show what they cost, and apply the one that was chosen."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="HF folder, hub id or .gguf file")
    parser.add_argument("out", type=Path, help="folder of the plans and the bundle")
    parser.add_argument(
        "--megabytes", type=float, nargs="+", required=True, help="sizes of the exported files"
    )
    parser.add_argument("--apply", type=float, help="also make the bundle of this size")
    args = parser.parse_args(arguments)

    args.out.mkdir(parents=True, exist_ok=True)
    print(f"{'MB':>8}  {'loss +':>7}  matrices")
    for megabytes in args.megabytes:
        # One budget for the whole file: the planner weighs formats and ranks of all matrices against each other.
        recipe = Recipe.load("default").with_budget(Budget("size", megabytes * 1e6))
        plan = make_plan(args.model, recipe)
        plan.save(path_of(args.out, megabytes))
        # The predicted increase of the mean loss, in nats per token: it ranks plans, it is no measured perplexity.
        print(f"{megabytes:>8g}  {plan.predicted_loss or 0:>7.3f}  {what_is_done(plan)}")

    if args.apply is not None:
        # A saved plan may be edited first: it is a JSON file with a line for every choice.
        plan = Plan.load(path_of(args.out, args.apply))
        report = compress(args.model, args.out / f"bundle-{args.apply:g}MB", plan=plan)
        print(parity_text(report.parity))


def path_of(folder: Path, megabytes: float) -> Path:
    """Return where the plan of a size lies."""
    return folder / f"plan-{megabytes:g}MB.json"


def what_is_done(plan: Plan) -> str:
    """Return how many sites, a matrix or a group of joint ones, get which form and bits."""
    kinds = Counter(
        f"{site.form} {'floats' if site.quant is None else f'INT{site.quant.bits}'}" for site in plan.sites
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


if __name__ == "__main__":
    main()

"""The Python API on a model folder or hub id: plan, compress, verify, generate.

python samples/quickstart.py MODEL OUT
"""

from __future__ import annotations

import argparse
from pathlib import Path

import rk_export
from rk_export import Factorize, Prepare, Quantize, Recipe, findings_table, parity_text
from rk_export.runtime import GenerationOptions, Session


def main(arguments: list[str] | None = None) -> None:
    """Compress a model into a bundle and let it continue a prompt."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="HF folder, hub id or .gguf file")
    parser.add_argument("out", type=Path, help="bundle folder, new")
    parser.add_argument("--prompt", default="The harbour was quiet")
    args = parser.parse_args(arguments)

    # A recipe is a list of steps; `Recipe.load("int4")` takes a preset, and `Recipe.load("mine.yaml")` a file. Here:
    # joint rank-k factors for [W_q; W_k], INT4 with zero points, embedding and head in INT8.
    recipe = Recipe(
        (
            Prepare(),
            Factorize(("qk",), keep=0.95),
            Quantize(("layers",), bits=4, symmetric=False),
            Quantize(("embed_tokens", "lm_head"), bits=8),
        )
    )

    # A plan says what will happen to each matrix. It can be saved, read, edited and applied again.
    plan = rk_export.make_plan(args.model, recipe)
    print(findings_table(rk_export.dry_run(args.model, plan=plan).findings[:8]))

    # compress raises ParityError, and leaves no bundle, unless ONNX Runtime computes what PyTorch computes.
    report = rk_export.compress(args.model, args.out, plan=plan)
    print(parity_text(report.parity))

    # Whoever receives the bundle checks files and parity again; `against` would measure every tier anew.
    assert all(tier.passed is not False for tier in rk_export.verify(args.out))

    # Prompts of unequal length run as one batch; what that may change as shipped: docs/reference/parity.md, tier h.
    session = Session.from_pretrained(args.out)
    prompts = [args.prompt, "Once upon a time, there was"]
    for result in session.generate(prompts, options=GenerationOptions(max_new_tokens=32)):
        print(repr(result.text), result.finish_reason.value)


if __name__ == "__main__":
    main()

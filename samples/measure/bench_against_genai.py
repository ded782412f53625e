"""INT4 bundle against onnxruntime-genai: file size beside its own builder's, speed on the same bundle.

One process is no sample: where its buffers happen to lie decides a few percent. So every round is a process of
its own, the order of the contestants turns from round to round, and medians and quartiles of the ratios are kept.

    python samples/measure/bench_against_genai.py                      SmolLM2-135M-Instruct
    python samples/measure/bench_against_genai.py --model DIR --rounds 2 --out /tmp/results

Writes docs/results/int4_against_genai.json and int4_against_genai.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Results, Row

from rk_export import Prepare, Quantize, Recipe, Run, compress
from rk_export.runtime import bench

OURS, SAME_BUNDLE, ITS_BUILDER = (
    "rk-export",
    "onnxruntime-genai, same bundle",
    "onnxruntime-genai, its own builder",
)
PHASES = ("prefill", "decode")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build what is missing, measure, write JSON and Markdown."""
    parser = harness.parser(__doc__, "model")
    parser.add_argument(
        "--work", type=Path, default=Path("out/bench_against_genai"), help="folder of bundles"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one-round", type=int, metavar="N", help=argparse.SUPPRESS)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure one round in this process, or every round that is missing in processes of their own."""
    ours, peer = args.work / "ours", args.work / "genai"
    if args.one_round is not None:
        print(json.dumps(one_round(args, ours, peer)))
        return
    build(harness.model_of(args), ours, peer, args.threads)
    sizes = {OURS: harness.model_bytes(ours), ITS_BUILDER: harness.model_bytes(peer)}
    facts = {
        "model": harness.model_name(args),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: getattr(args, name) for name in ("prompt_tokens", "new_tokens", "threads")},
        "file_bytes": sizes,
    }
    results = Results(args.out, "int4_against_genai", facts)
    same = {"--work": args.work, "--prompt-tokens": args.prompt_tokens, "--new-tokens": args.new_tokens}
    words = [str(word) for option in {**same, "--threads": args.threads}.items() for word in option]
    one = partial(harness.in_own_process, __file__, *words, "--one-round")
    results.measure((f"round {number + 1}", partial(one, str(number))) for number in range(args.rounds))
    results.write_page(page(results))


def build(model: Path, ours: Path, peer: Path, threads: int) -> None:
    """Make both bundles unless they are there."""
    if not ours.exists():
        # Round to nearest, as the peer's builder: the comparison is one of sizes and speeds.
        recipe = Recipe((Prepare(), Quantize(("all",), bits=4, quantizer="rtn")))
        compress(model, ours, recipe, run=Run(threads=threads))
    if not (peer / "model.onnx").exists():
        subprocess.run(harness.genai_builder(model, peer), check=True)


def one_round(args: argparse.Namespace, ours: Path, peer: Path) -> Row:
    """Return tokens per second by contestant and phase."""
    contestants = {str(ours): OURS, f"genai:{ours}": SAME_BUNDLE, f"genai:{peer}": ITS_BUILDER}
    turn = args.one_round % len(contestants)
    order = [*list(contestants)[turn:], *list(contestants)[:turn]]
    result = bench(
        order, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens, repeats=2, threads=args.threads
    )
    rows = zip(order, result.rows, strict=True)
    return {
        "speeds": {
            contestants[key]: {"prefill": row.prefill_median, "decode": row.decode_median}
            for key, row in rows
        }
    }


def page(results: Results) -> str:
    """Return the result as a page."""
    facts, rounds = results.facts, [row["speeds"] for row in results.rows.values()]
    lines = [
        (
            *(name, f"{speed(rounds, name, 'prefill'):.0f}", f"{speed(rounds, name, 'decode'):.1f}"),
            *("" if name == OURS else ratio(rounds, name, phase) for phase in PHASES),
        )
        for name in rounds[0]
    ]
    ours, peer = facts["file_bytes"][OURS], facts["file_bytes"][ITS_BUILDER]
    return "\n".join(
        [
            "# INT4 against onnxruntime-genai",
            "",
            "This page compares the speed of an INT4 bundle in our runtime, of the same bundle in onnxruntime-genai "
            "(GenAI), and of the model that GenAI's own builder makes.",
            "",
            f"Made by `python samples/measure/bench_against_genai.py` on {facts['machine']}, with {facts['threads']} "
            f"threads. The prompt has {facts['prompt_tokens']} tokens, and {facts['new_tokens']} new tokens are "
            f"generated. {len(rounds)} processes ran, and the contestants ran in another order in each.",
            "",
            "*ours / it* is our speed over the other's within one process: the median, and in brackets the lower and "
            "upper quartile. In the prefill our runtime asks for the logits of the last position only. GenAI computes "
            "them for all.",
            "",
            harness.table(
                ["", "prefill tok/s", "decode tok/s", "ours / it, prefill", "ours / it, decode"], lines
            ),
            "",
            "Both models are INT4 in blocks of 32, the embedding and lm_head included. Their files model.onnx and "
            f"model.onnx.data take {ours / 1e6:.2f} MB for ours and {peer / 1e6:.2f} MB for the builder's "
            f"({100 * (ours / peer - 1):+.1f} %).",
            "",
        ]
    )


def speed(rounds: Sequence[Row], name: str, phase: str) -> float:
    """Return the median tokens per second of a contestant."""
    return median(one[name][phase] for one in rounds)


def ratio(rounds: Sequence[Row], name: str, phase: str) -> str:
    """Return ours over a contestant's, round by round: median and quartiles."""
    values = [one[OURS][phase] / one[name][phase] for one in rounds]
    lower, middle, upper = quantiles(values, n=4) if len(values) > 1 else values * 3
    return f"{middle:.2f} [{lower:.2f}, {upper:.2f}]"


if __name__ == "__main__":
    sys.exit(main())

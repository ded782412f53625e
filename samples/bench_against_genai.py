"""INT4 bundle against onnxruntime-genai: file size beside its own builder's, speed on the same bundle.

One process is no sample: where its buffers happen to lie decides a few percent. So every round is a process of
its own, the order of the contestants turns from round to round, and medians and quartiles of the ratios are kept.

    python samples/bench_against_genai.py                      # SmolLM2-135M-Instruct, writes docs/results
    python samples/bench_against_genai.py --model DIR --rounds 2 --results /tmp/results
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from rk_export import CompressOptions, QuantSpec, compress
from rk_export.evaluation.assets import smollm2
from rk_export.folders import library_versions
from rk_export.options.run import Run
from rk_export.runtime import bench

OURS, SAME_BUNDLE, ITS_BUILDER = (
    "rk-export",
    "onnxruntime-genai, same bundle",
    "onnxruntime-genai, its own builder",
)


def main() -> None:
    """Build what is missing, measure, write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="HF folder (default: SmolLM2-135M-Instruct, fetched)")
    parser.add_argument("--work", type=Path, default=Path("out/bench_against_genai"))
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one-round", type=int, metavar="N", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_round is not None:
        print(json.dumps(one_round(args)))
        return
    model = args.model or smollm2()
    ours, peer = args.work / "ours", args.work / "genai"
    if not ours.exists():
        quant = QuantSpec(4, 32)
        # Round to nearest, as the peer's builder: the comparison is one of sizes and speeds.
        options = CompressOptions(quant=quant, embedding_quant=quant, quantizer="rtn")
        compress(model, ours, options, run=Run(threads=args.threads))
    if not (peer / "model.onnx").exists():
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
        subprocess.run([*builder, "-i", str(model), "-o", str(peer)], check=True)
    rounds = [run_round(number) for number in range(args.rounds)]
    result = summary(args, rounds, {OURS: file_bytes(ours), ITS_BUILDER: file_bytes(peer)})
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "int4_against_genai.json").write_text(
        json.dumps(result, indent=1) + "\n", encoding="utf-8"
    )
    (args.results / "int4_against_genai.md").write_text(markdown(result), encoding="utf-8")
    print(markdown(result))


def run_round(number: int) -> dict[str, dict[str, float]]:
    """Measure once in a fresh process."""
    print(f"round {number + 1}", file=sys.stderr)
    command = [sys.executable, *sys.argv, "--one-round", str(number)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, dict[str, float]] = json.loads(output.splitlines()[-1])
    return result


def one_round(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return tokens per second by contestant and phase."""
    ours, peer = args.work / "ours", args.work / "genai"
    contestants = {str(ours): OURS, f"genai:{ours}": SAME_BUNDLE, f"genai:{peer}": ITS_BUILDER}
    turn = args.one_round % len(contestants)
    order = [*list(contestants)[turn:], *list(contestants)[:turn]]
    result = bench(
        order, prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens, repeats=2, threads=args.threads
    )
    rows = zip(order, result.rows, strict=True)
    return {
        contestants[key]: {"prefill": row.prefill_median, "decode": row.decode_median} for key, row in rows
    }


def summary(args: argparse.Namespace, rounds: list[dict[str, Any]], sizes: dict[str, int]) -> dict[str, Any]:
    """Return medians, and ratios of ours to each peer round by round."""
    phases = ("prefill", "decode")
    speeds = {
        name: {phase: median(entry[name][phase] for entry in rounds) for phase in phases}
        for name in rounds[0]
    }
    ratios = {
        name: {
            phase: spread([entry[OURS][phase] / entry[name][phase] for entry in rounds]) for phase in phases
        }
        for name in (SAME_BUNDLE, ITS_BUILDER)
    }
    return {
        "command": "python samples/bench_against_genai.py",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": library_versions(),
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "threads": args.threads,
        "rounds": rounds,
        "tokens_per_second": speeds,
        "ratio_of_ours": ratios,
        "file_bytes": sizes,
    }


def spread(values: list[float]) -> dict[str, float]:
    """Return median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "lower": values[0], "upper": values[0]}
    lower, middle, upper = quantiles(values, n=4)
    return {"median": middle, "lower": lower, "upper": upper}


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a page."""
    rows = [
        f"| {name} | {speed['prefill']:.0f} | {speed['decode']:.1f} | {ratio_cell(result, name, 'prefill')} "
        f"| {ratio_cell(result, name, 'decode')} |"
        for name, speed in result["tokens_per_second"].items()
    ]
    ours, peer = result["file_bytes"][OURS], result["file_bytes"][ITS_BUILDER]
    return "\n".join(
        [
            "# INT4 against onnxruntime-genai",
            "",
            f"`{result['command']}`, {result['machine']}, {result['threads']} threads, prompt of "
            f"{result['prompt_tokens']} tokens, {result['new_tokens']} new tokens, {len(result['rounds'])} processes, "
            "order turned. "
            "Ratios are ours over the peer's within a process: median [lower, upper quartile]. "
            "In the prefill our runtime asks for the logits of the last position only; GenAI computes "
            "them for all.",
            "",
            "| | prefill tok/s | decode tok/s | ours / it, prefill | ours / it, decode |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Size of model.onnx and model.onnx.data, both INT4 in blocks of 32 with embedding and lm_head: ours "
            f"{ours / 1e6:.2f} MB, its builder's {peer / 1e6:.2f} MB ({100 * (ours / peer - 1):+.1f} %).",
            "",
        ]
    )


def ratio_cell(result: dict[str, Any], name: str, phase: str) -> str:
    """Return one cell of ratios."""
    if name == OURS:
        return ""
    ratio = result["ratio_of_ours"][name][phase]
    return f"{ratio['median']:.2f} [{ratio['lower']:.2f}, {ratio['upper']:.2f}]"


def file_bytes(folder: Path) -> int:
    """Return the bytes of the model's two files."""
    return sum((folder / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))


if __name__ == "__main__":
    main()

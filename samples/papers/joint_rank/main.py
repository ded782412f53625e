"""The experiments of 2402.16319 ("Data-free Weight Compress and Denoise") on one small model, in six parts.

    figure3        joint against separate factors over kept ratios, by perplexity
    figure4        OpenBookQA over the kept ratio of q and k, against the dense model item by item
    watermark      a sentence is taught by fine-tuning; does truncation remove it, and what else does it remove?
    denoise        noise is added to the weights; does truncation come closer to the clean layer?
    orthogonality  the shared factor's rows and the space they span, truncated, rounded and refitted
    spectra        spectra of all layers, and ranks shared out by them, at equal parameters

    python samples/papers/joint_rank/main.py                           everything that is not measured yet
    python samples/papers/joint_rank/main.py --parts figure3,figure4
    python samples/papers/joint_rank/main.py --seconds 240             stops after four minutes; run it again to go on

Writes joint_rank.json, joint_rank.md and a figure a part into docs/results. Nothing is quantized (but in
`orthogonality`) or exported: weights are replaced by products of factors, which compute what the factor pairs compute.
Matrices multiply in bfloat16 where the processor has it. Ranks are not rounded to multiples.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a script

from assets import smollm2
from measure import harness
from measure.harness import Measure, Results, Rows
from papers.joint_rank import denoise, figure3, figure4, orthogonality, spectra, watermark
from papers.joint_rank.study import CLEAN, Part, Protocol, Study

from rk_export import InputError, StoredModel, open_source

PARTS = {
    module.PART.name: module.PART for module in (figure3, figure4, watermark, denoise, orthogonality, spectra)
}


def rows_of(results: Results, part: Part) -> Rows:
    """Return the rows of a part that were measured so far."""
    prefix = f"{part.name}/"
    return {key.removeprefix(prefix): row for key, row in results.rows.items() if key.startswith(prefix)}


def wanted(study: Study, part: Part) -> Iterator[tuple[str, Measure]]:
    """Yield the rows of a part."""
    for key, measure in part.rows(study):
        yield f"{part.name}/{key}", measure


def page(results: Results) -> str:
    """Return the results as Markdown, a section a part."""
    facts = results.facts
    lines = [
        "# Joint rank-k approximation: the paper's experiments on a small model",
        "This page repeats the experiments of arXiv 2402.16319 on "
        f"{Path(facts['model']).name or harness.DEFAULT_MODEL}. The paper replaces matrices that read the same input "
        "(such as the query and key matrices, q and k) by one shared factor and one factor each. *Kept* is the share "
        "of the parameters of the factorized matrices that stays.",
        f"Perplexity is measured on {Path(facts['text']).name or 'wiki_eval.txt'}: on its first {facts['tokens']} "
        f"tokens in figure 3, and on its first {facts['short_tokens']} tokens elsewhere. Windows have "
        f"{facts['context']} tokens, do not overlap, and begin without a beginning-of-sequence token. Matrices "
        "multiply in bfloat16 where the processor has it. Ranks are not rounded.",
        "Made by `python samples/papers/joint_rank/main.py`. All digits: [joint_rank.json](joint_rank.json).",
    ]
    for part in PARTS.values():
        rows = rows_of(results, part)
        if not rows:
            continue
        lines += [f"## {part.title}", part.method]
        if part.draw(rows) is not None:
            lines.append(f"![{part.title}](joint_rank_{part.name}.svg)")
        lines += [*part.tables(rows), "### Reading"]
        lines.append("\n".join(f"- {line}" for line in part.reading(rows)))
    return "\n\n".join(lines) + "\n"


def write_report(results: Results) -> None:
    """Write the page and a figure a part."""
    for part in PARTS.values():
        rows = rows_of(results, part)
        if rows and (figure := part.draw(rows)) is not None:
            harness.save_figure(figure, results.folder / f"joint_rank_{part.name}.svg")
    results.write_page(page(results))


def clean_source(study: Study) -> StoredModel:
    """Return the dense model's files."""
    return open_source(study.protocol.model or smollm2())


def parser() -> argparse.ArgumentParser:
    """Return the arguments: what the protocol leaves open, and where and how long to work."""
    result, default = harness.parser(__doc__), Protocol()
    result.add_argument("--parts", default=",".join(PARTS), help="some of them, separated by commas")
    result.add_argument(
        "--model", default="", help="HF folder, hub id or .gguf (default SmolLM2-135M-Instruct)"
    )
    result.add_argument("--text", default="", help="text for perplexity (default Wikipedia prose)")
    result.add_argument("--tokens", type=int, default=default.tokens, help="of the text, in figure3")
    result.add_argument("--short-tokens", type=int, default=default.short_tokens, help="in all other parts")
    result.add_argument("--context", type=int, default=default.context)
    result.add_argument("--task", default=default.task, help="a known task, or a .jsonl file, for figure4")
    result.add_argument("--items", type=int, default=default.items, help="of the task")
    result.add_argument("--calibration-tokens", type=int, default=default.calibration_tokens)
    result.add_argument("--steps", type=int, default=default.steps, help="most steps of fine-tuning")
    result.add_argument("--learning-rate", type=float, default=default.learning_rate, help="of fine-tuning")
    result.add_argument("--seconds", type=float, default=math.inf, help="start no row after so many seconds")
    result.add_argument("--work", type=Path, default=Path("out/joint_rank"), help="of the fine-tuned model")
    return result


def study_of(args: argparse.Namespace) -> Study:
    """Return the study that a command line asks for."""
    protocol = Protocol(**{field.name: getattr(args, field.name) for field in fields(Protocol)})
    return Study(protocol, args.work, {CLEAN: clean_source, watermark.TAUGHT: watermark.taught_source})


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing; return 0 when all rows are there, 3 when time ran out, 2 for bad input."""
    return harness.run(script, parser().parse_args(arguments))


def script(args: argparse.Namespace) -> int:
    """Measure and report; see `main`."""
    until = time.monotonic() + args.seconds
    names = args.parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise InputError(
            f"unknown part {unknown[0]!r}", where="--parts", fix=f"choose from {', '.join(PARTS)}"
        )
    study = study_of(args)
    results = Results(args.out, "joint_rank", vars(study.protocol))
    complete = [results.measure(wanted(study, PARTS[name]), until=until) for name in names]
    write_report(results)
    return 0 if all(complete) else 3


if __name__ == "__main__":
    sys.exit(main())

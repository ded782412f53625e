"""The experiments of 2402.16319 ("Data-free Weight Compress and Denoise") on one small model, in six parts.

    figure3        joint against separate factors over kept ratios, by perplexity
    figure4        OpenBookQA over the kept ratio of q and k, against the dense model item by item
    watermark      a sentence is taught by fine-tuning; does truncation remove it, and what else does it remove?
    denoise        noise is added to the weights; does truncation come closer to the clean layer?
    orthogonality  the shared factor's rows and the space they span, truncated, rounded and refitted
    spectra        spectra of all layers, and ranks shared out by them, at equal parameters

    python samples/joint_rank_paper.py                           everything that is not measured yet
    python samples/joint_rank_paper.py --parts figure3,figure4
    python samples/joint_rank_paper.py --seconds 240             stops after about four minutes; run it again to go on

Every row is kept in ``joint_rank.json`` as soon as it is measured; ``joint_rank.md`` and a figure a part are drawn from
that file at the end of each run. Nothing is quantized (but in `orthogonality`) or exported: weights are replaced by
products of factors, which compute what the factor pairs compute. Matrices multiply in bfloat16 where the processor has
it. Ranks are not rounded to multiples.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rk_export.cli.main import quiet_libraries
from rk_export.errors import InputError
from rk_export.folders import library_versions
from rk_export.report.svg import save_figure
from rk_export.source.stored import StoredModel, open_source

sys.path.insert(0, str(Path(__file__).parent))  # for those who run or load this file from elsewhere

from joint_rank import denoise, figure3, figure4, orthogonality, spectra, watermark
from joint_rank.study import CLEAN, Part, Protocol, Rows, Study, short

logger = logging.getLogger("joint_rank")
PARTS = {
    module.PART.name: module.PART for module in (figure3, figure4, watermark, denoise, orthogonality, spectra)
}


def load_results(path: Path, protocol: Protocol) -> dict[str, Rows]:
    """Return the rows measured earlier, by part.

    Raises:
        InputError: If they were measured under another protocol.
    """
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["protocol"] != vars(protocol):
        changed = [name for name, value in vars(protocol).items() if data["protocol"].get(name) != value]
        raise InputError(
            f"holds rows of another protocol ({', '.join(changed)} differ)",
            where=str(path),
            fix="give another --out",
        )
    parts: dict[str, Rows] = data["parts"]
    return parts


def save_results(path: Path, protocol: Protocol, parts: Mapping[str, Rows]) -> None:
    """Write all rows."""
    data = {"protocol": vars(protocol), "versions": library_versions(), "parts": parts}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def measure_part(study: Study, part: Part, path: Path, deadline: float) -> bool:
    """Measure the rows of a part that are missing; return whether all are there."""
    rows = study.results.setdefault(part.name, {})
    for key, measure in part.rows(study):
        if key in rows:
            continue
        if time.monotonic() > deadline:
            return False
        start = time.monotonic()
        rows[key] = measure()
        rows[key]["seconds"] = round(time.monotonic() - start, 1)
        numbers = {name: value for name, value in rows[key].items() if isinstance(value, float)}
        logger.info("%s %s: %s", part.name, key, {name: float(short(x)) for name, x in numbers.items()})
        save_results(path, study.protocol, study.results)
    return True


def page(protocol: Protocol, results: Mapping[str, Rows]) -> str:
    """Return the results as Markdown, a section a part."""
    lines = [
        "# Joint rank-k approximation: the paper's experiments on a small model",
        f"{protocol.model_name}, experiments after 2402.16319. Perplexity on the first {protocol.tokens} tokens "
        f"(figure 3) or {protocol.short_tokens} tokens (the rest) of "
        f"{Path(protocol.text).name or 'wiki_eval.txt'}, windows of {protocol.context} that do not overlap, no "
        "beginning-of-sequence token; matrices multiply in bfloat16 where the processor has it. Ranks are not "
        "rounded. Kept ratios count the parameters of the factorized matrices.",
        "Made by `python samples/joint_rank_paper.py`; numbers with all digits: [joint_rank.json](joint_rank.json).",
    ]
    for part in PARTS.values():
        rows = results.get(part.name)
        if not rows:
            continue
        lines += [f"## {part.title}", part.method]
        if part.draw(rows) is not None:
            lines.append(f"![{part.title}](joint_rank_{part.name}.svg)")
        lines += [*part.tables(rows), "### Reading"]
        lines.append("\n".join(f"- {line}" for line in part.reading(rows)))
    return "\n\n".join(lines) + "\n"


def write_report(out: Path, protocol: Protocol, results: Mapping[str, Rows]) -> None:
    """Write the page and a figure a part."""
    for name, rows in results.items():
        if rows and (figure := PARTS[name].draw(rows)) is not None:
            save_figure(figure, out / f"joint_rank_{name}.svg")
    (out / "joint_rank.md").write_text(page(protocol, results), encoding="utf-8")


def clean_source(study: Study) -> StoredModel:
    """Return the dense model's files."""
    from rk_export.evaluation.assets import smollm2

    return open_source(study.protocol.model or smollm2())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Protocol()
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them, separated by commas")
    parser.add_argument(
        "--model", default="", help="HF folder, hub id or .gguf (default SmolLM2-135M-Instruct)"
    )
    parser.add_argument("--text", default="", help="text for perplexity (default Wikipedia prose)")
    parser.add_argument("--tokens", type=int, default=default.tokens, help="of the text, in figure3")
    parser.add_argument("--short-tokens", type=int, default=default.short_tokens, help="in all other parts")
    parser.add_argument("--context", type=int, default=default.context)
    parser.add_argument("--task", default=default.task, help="name or .jsonl file of the task of figure4")
    parser.add_argument("--items", type=int, default=default.items, help="of the task")
    parser.add_argument("--calibration-tokens", type=int, default=default.calibration_tokens)
    parser.add_argument("--steps", type=int, default=default.steps, help="most steps of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate, help="of fine-tuning")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no row after so many seconds")
    parser.add_argument(
        "--work", type=Path, default=Path("out/joint_rank"), help="folder of the fine-tuned model"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing; return 0 when all rows are there, 3 when time ran out, 2 for bad input."""
    values = vars(_parser().parse_args(arguments))
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    logger.setLevel(logging.INFO)
    quiet_libraries()
    try:
        return run(**values)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2


def run(parts: str, seconds: float, work: Path, out: Path, **choices: Any) -> int:
    """Measure and report; see `main`."""
    deadline = time.monotonic() + seconds
    names = parts.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        raise InputError(
            f"unknown part {unknown[0]!r}", where="--parts", fix=f"choose from {', '.join(PARTS)}"
        )
    protocol = Protocol(**choices)
    path = out / "joint_rank.json"
    makers = {CLEAN: clean_source, watermark.TAUGHT: watermark.taught_source}
    study = Study(protocol, work, makers, load_results(path, protocol))
    complete = [measure_part(study, PARTS[name], path, deadline) for name in names]
    write_report(out, protocol, study.results)
    return 0 if all(complete) else 3


if __name__ == "__main__":
    sys.exit(main())

"""all-MiniLM-L6-v2 dense and compressed: size, what is left of its vectors, and sentences a second.

    python samples/measure/encoders.py                    all rows; minutes each
    python samples/measure/encoders.py --rows int4 speed  some of them

Writes docs/results/encoders.json and encoders.md. `dynamic` is the dense export after
`onnxruntime.quantization.quantize_dynamic`, with a scale for each column. Bundles stay in --work. Reading the sentences
needs pyarrow.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from assets import minilm, paraphrases, questions_and_passages, wiki_text
from measure import harness
from measure.harness import Results, Row

from rk_export import CalibrationOptions, Recipe, Run, TextFile, compress
from rk_export.runtime import Encoder

RECIPES = {"dense": "floats", "w8a8": "w8a8", "int8": "int8", "int4": "int4", "int4 on prose": "int4"}
VARIANTS = (*RECIPES, "dynamic")
TIMED = ("dense", "w8a8", "int8", "int4", "dynamic")  # a text changes no format
TITLES = {
    "dense": "dense, fp32",
    "w8a8": "W8A8",
    "int8": "INT8 weights",
    "int4": "INT4 weights",
    "int4 on prose": "INT4 weights, calibrated on prose",
    "dynamic": "dynamic INT8 of onnxruntime.quantization",
    "int8 at level 0": "INT8 weights, float inputs",
    "int4 at level 0": "INT4 weights, float inputs",
}
FILES = ("model.onnx", "model.onnx.data")
ROUNDS, SENTENCES, BATCH = 5, 64, 32
POINTS = {"w8a8": 0.5, "int8": 0.5, "int4": 1.5, "int4 on prose": 1.5}
BYTES = {"w8a8": 0.27, "int8": 0.27, "int4": 0.17, "int4 on prose": 0.17}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure every variant; write JSON and Markdown."""
    parser = harness.parser(__doc__, "rows")
    parser.add_argument(
        "--work", type=Path, default=Path("out/encoders"), help="folder of the bundles (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="of ONNX Runtime (default %(default)s)")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure the rows that are missing, and write the page."""
    facts = {"model": "all-MiniLM-L6-v2", "threads": args.threads, "batch": BATCH}
    results = Results(args.out, "encoders", facts)
    rows = [(name, partial(quality, name, args.work, args.threads)) for name in VARIANTS]
    results.measure([*rows, ("speed", partial(speed, args.work, args.threads))], args.rows)
    results.write_page(page(results))


def bundle_of(name: str, work: Path) -> Path:
    """Return the bundle of a variant, made on first use."""
    folder = work / name
    if folder.is_dir():
        return folder
    if name == "dynamic":
        return _dynamic(bundle_of("dense", work), folder)
    recipe = Recipe.load(RECIPES[name])
    if name == "int4 on prose":
        recipe = replace(recipe, calibration=CalibrationOptions(TextFile.of(wiki_text("calib"))))
    compress(minilm(), folder, recipe, run=Run(threads=2))
    return folder


def _dynamic(dense: Path, folder: Path) -> Path:
    """Copy a bundle with a graph that ONNX Runtime's own tool quantized."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns(*FILES, "rk_manifest.json"))
    quantize_dynamic(dense / FILES[0], folder / FILES[0], weight_type=QuantType.QInt8, per_channel=True)
    return folder


def quality(name: str, work: Path, threads: int) -> Row:
    """Return a variant's bytes, the cosine of its vectors to the dense ones, and what they find."""
    folder = bundle_of(name, work)
    found = _vectors(folder, threads)
    dense = _vectors(bundle_of("dense", work), threads)
    cosines = np.concatenate([(one * other).sum(1) for one, other in zip(found, dense, strict=True)])
    first, second, questions, passages = found
    pairs, answers = paraphrases(), questions_and_passages()[2]
    ranks = _ranks(questions @ passages.T, answers)
    return {
        "bytes": sum((folder / file).stat().st_size for file in FILES if (folder / file).is_file()),
        "cosine_mean": float(cosines.mean()),
        "cosine_worst": float(cosines.min()),
        "mrpc_average_precision": average_precision((first * second).sum(1), [same for *_, same in pairs]),
        "sciq_recall_at_1": float((ranks == 1).mean()),
        "sciq_mean_reciprocal_rank": float((1 / ranks).mean()),
    }


@cache
def _vectors(folder: Path, threads: int) -> tuple[np.ndarray, ...]:
    """Return the vectors of MRPC's first and second sentences, and of SciQ's questions and passages."""
    pairs, (questions, passages, _) = paraphrases(), questions_and_passages()
    texts = [[pair[0] for pair in pairs], [pair[1] for pair in pairs], questions, passages]
    encoder = Encoder(folder, provider="cpu", threads=threads)
    return tuple(encoder.encode(one, batch_size=BATCH) for one in texts)


def _ranks(scores: np.ndarray, answers: Sequence[int]) -> np.ndarray:
    """Return the place of each question's passage among all, from 1 on."""
    own = scores[np.arange(len(answers)), answers]
    return np.asarray((scores >= own[:, None]).sum(axis=1))


def average_precision(scores: np.ndarray, labels: Sequence[bool]) -> float:
    """Return the mean over the positives of the precision among all that score as high."""
    right = np.asarray(labels)[np.argsort(-scores, kind="stable")]
    precision = np.cumsum(right) / np.arange(1, len(right) + 1)
    return float(precision[right].mean())


def speed(work: Path, threads: int) -> Row:
    """Return sentences a second of each variant, and the median ratio to dense; variants take turns."""
    encoders = {
        name: Encoder(bundle_of(name, work), provider="cpu", threads=threads, spinning=False)
        for name in TIMED
    }
    for name in ("int8", "int4"):
        encoders[f"{name} at level 0"] = Encoder(
            bundle_of(name, work), provider="cpu", threads=threads, spinning=False, accuracy_level=0
        )
    texts = {
        "sentences": [pair[0] for pair in paraphrases()][:SENTENCES],
        "passages": questions_and_passages()[1][:SENTENCES],
    }
    return {kind: _rates(encoders, given) for kind, given in texts.items()}


def _rates(encoders: dict[str, Encoder], texts: list[str]) -> Row:
    """Return a rate and a ratio for each encoder, by processor time of this process."""
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for round_ in range(ROUNDS + 1):
        for name, encoder in encoders.items():
            start = time.process_time()
            encoder.encode(texts, batch_size=BATCH)
            if round_:  # the first one warms up
                seconds[name].append(time.process_time() - start)
    dense = seconds["dense"]
    return {
        name: {
            "sentences_per_second": round(len(texts) / statistics.median(own), 1),
            "ratio": round(statistics.median(a / b for a, b in zip(dense, own, strict=True)), 3),
        }
        for name, own in seconds.items()
    }


def page(results: Results) -> str:
    """Return the page: what is left, the speed, and what the rows show."""
    rows = results.ordered(VARIANTS)
    dense = rows.get("dense")
    lines = []
    for name, row in rows.items():
        ratio = row["bytes"] / dense["bytes"] if dense else float("nan")
        lines.append(
            [
                TITLES[name],
                f"{row['bytes'] / 1e6:.1f} MB",
                f"{ratio:.3f}",
                f"{row['cosine_mean']:.4f}",
                f"{row['cosine_worst']:.4f}",
                f"{100 * row['mrpc_average_precision']:.2f}",
                f"{100 * row['sciq_recall_at_1']:.2f}",
                f"{100 * row['sciq_mean_reciprocal_rank']:.2f}",
            ]
        )
    head = ["variant", "files", "ratio", "cosine, mean", "worst", "MRPC AP", "SciQ recall@1", "MRR"]
    return "\n".join(
        [
            "# An embedding model, dense and compressed",
            "",
            "all-MiniLM-L6-v2 (22.7 M parameters, half of them the token table) in ONNX Runtime on a CPU. Made by",
            "`python samples/measure/encoders.py`.",
            "",
            "- *Cosine* is that of a text's vector to the dense model's, over all texts below.",
            "- *MRPC AP* is the average precision of the cosine of two sentences as a sign that they say the same: the "
            "408 validation pairs of MRPC.",
            "- *SciQ recall@1* is the share of questions whose own passage is the nearest of all passages: the 887 "
            "validation questions that have one. *MRR* is the mean of 1 / its rank.",
            "- All figures but sizes and cosines are percentages.",
            "- *Calibrated on prose*: the statistics are those of English Wikipedia (`--set calibration.text=FILE`). "
            "The other variants draw tokens at random.",
            "",
            harness.table(head, lines, "-" + "r" * 7),
            "",
            *_speed_lines(results),
            harness.reading(_reading(results)),
            "",
        ]
    )


def _speed_lines(results: Results) -> list[str]:
    if "speed" not in results.rows:
        return []
    row = results.rows["speed"]
    names = [name for name in TITLES if name in row["sentences"]]
    lines = [
        [
            TITLES[name],
            *(
                f"{row[kind][name][what]:.{digits}f}"
                for kind in ("sentences", "passages")
                for what, digits in (("sentences_per_second", 0), ("ratio", 2))
            ),
        ]
        for name in names
    ]
    head = ["variant", "sentences / s", "ratio", "passages / s", "ratio"]
    threads = results.facts["threads"]
    return [
        "## Speed",
        "",
        f"{SENTENCES} sentences of MRPC (about 27 tokens) and {SENTENCES} passages of SciQ (about 110 tokens), in "
        f"batches of at most {BATCH} texts and 512 tokens, tokenizing included. "
        f"ONNX Runtime had {threads} thread{'s' * (threads > 1)}. "
        "The time is processor time of the process, so tokenizing counts on all its threads. The variants took turns "
        f"{ROUNDS} times: rates are medians, a ratio is the median of the ratios to dense within a turn.",
        "",
        harness.table(head, lines, "-" + "r" * 4),
        "",
    ]


def _reading(results: Results) -> list[str]:
    """Return what became of the aims: points that are lost, bytes, and speed."""
    rows, dense = results.rows, results.rows.get("dense")
    speeds = rows.get("speed")
    if dense is None:
        return []
    lines = []
    for name, points in POINTS.items():
        if name not in rows:
            continue
        row = rows[name]
        lost = {
            title: 100 * (dense[key] - row[key])
            for title, key in (("MRPC AP", "mrpc_average_precision"), ("recall@1", "sciq_recall_at_1"))
        }
        told = ", ".join(f"{_points(value)} of {title}" for title, value in lost.items())
        held = "within" if max(lost.values()) <= points else "not within"
        ratio = row["bytes"] / dense["bytes"]
        line = f"{TITLES[name]}: {told}; {held} {points} points. {ratio:.3f} of the bytes; the aim was {BYTES[name]}."
        if speeds is not None and name in TIMED:
            first, second = (speeds[kind][name]["ratio"] for kind in ("sentences", "passages"))
            line += f" {first:.2f} times as fast as dense on sentences, {second:.2f} times on passages."
        lines.append(line)
    return lines


def _points(lost: float) -> str:
    return f"{abs(lost):.2f} points {'lost' if lost > 0 else 'won'}"


if __name__ == "__main__":
    sys.exit(main())

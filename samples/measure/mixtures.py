"""A mixture of 64 experts, 8 of them a token: the chosen experts alone, against every expert for every token.

python samples/measure/mixtures.py        writes docs/results/mixtures.json and mixtures.md

The model has random weights: four layers, hidden 512, experts of width 256. Both graphs hold the same numbers and run
in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported

import numpy as np
import onnxruntime as ort
import torch
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Measure, Results, Row

from rk_export import CalibrationOptions, Quantize, Recipe, rewrite_model
from rk_export.graph.build import build_graph, save_graph

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CACHED, PREFILL = 128, 128
FORMATS = {
    "INT4": Quantize(bits=4, block=32, quantizer="rtn"),
    "INT4, blocks of 128": Quantize(bits=4, block=128, symmetric=False, quantizer="rtn"),
    "INT8": Quantize(bits=8, block=32, quantizer="rtn"),
}
# Name -> new tokens, tokens in the cache, and the share of the repeats.
TASKS = {"decode of one token": (1, CACHED, 1.0), f"prefill of {PREFILL} tokens": (PREFILL, 0, 1 / 6)}


def made_model(folder: Path) -> Path:
    """Save the model with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("olmoe", **SHAPE)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder


def wanted(repeats: int) -> Iterator[tuple[str, Measure]]:
    """Yield every format."""
    for name in FORMATS:
        yield name, partial(measure, name, repeats)


def measure(name: str, repeats: int) -> Row:
    """Return the milliseconds of both graphs in one format, their files' bytes, and how far their logits differ."""
    with tempfile.TemporaryDirectory() as work:
        tables = Quantize(("embed_tokens", "lm_head"), bits=8, quantizer="rtn")
        recipe = Recipe((FORMATS[name], tables), CalibrationOptions("none"))
        rewritten = rewrite_model(made_model(Path(work) / "model"), recipe)
        sessions = {}
        row: Row = {"format": name}
        for graph, grouped in (("chosen", True), ("every", False)):
            folder = Path(work) / graph
            folder.mkdir()
            save_graph(build_graph(rewritten, group_experts=grouped)[0], folder)
            row[f"{graph}_bytes"] = harness.model_bytes(folder)
            sessions[graph] = opened(folder)
        for task, (tokens, cached, share) in TASKS.items():
            feed = feed_of(sessions["chosen"], tokens, cached)
            row[task] = timed(sessions, feed, round(share * repeats))
    return row


def opened(folder: Path) -> ort.InferenceSession:
    """Open a graph on one core: the time of a process is then that of a run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def feed_of(session: ort.InferenceSession, tokens: int, cached: int) -> dict[str, np.ndarray]:
    """Return random tokens behind a random cache."""
    rng = np.random.default_rng(0)
    feed = {
        "input_ids": rng.integers(1, SHAPE["vocab_size"], (1, tokens)),
        "attention_mask": np.ones((1, cached + tokens), np.int64),
    }
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = (1, value.shape[1], cached, value.shape[3])
            feed[value.name] = rng.standard_normal(shape, dtype=np.float32)
    return feed


def timed(sessions: dict[str, ort.InferenceSession], feed: dict[str, np.ndarray], repeats: int) -> Row:
    """Return milliseconds of the processor for both graphs, run in turns, and how far their logits differ."""
    times: dict[str, list[float]] = {name: [] for name in sessions}
    logits = {name: session.run(["logits"], feed)[0] for name, session in sessions.items()}
    for _ in range(repeats):
        for name, session in sessions.items():
            start = time.process_time()
            session.run(["logits"], feed)
            times[name].append(1e3 * (time.process_time() - start))
    difference = np.abs(logits["chosen"] - logits["every"]).max() / np.abs(logits["every"]).max()
    row: Row = {}
    for name, taken in times.items():
        row[f"{name}_ms"] = {"least": round(min(taken), 3), "median": round(statistics.median(taken), 3)}
    ratios = {kind: round(row["every_ms"][kind] / row["chosen_ms"][kind], 2) for kind in ("least", "median")}
    return {**row, "ratio": ratios, "difference": float(difference)}


def page(results: Results) -> str:
    """Return the figures as a page."""
    lines = [
        (
            *(row["format"], task),
            *(both(row[task][name], "{:.2f}") for name in ("every_ms", "chosen_ms")),
            *(both(row[task]["ratio"], "{:.1f}"), harness.short(row[task]["difference"])),
        )
        for row in results.rows.values()
        for task in TASKS
    ]
    head = ["experts", "task", "every expert, ms", "the chosen ones, ms", "ratio", "logits differ by"]
    return "\n".join(
        [
            "# Mixtures of experts",
            "",
            "This page shows what it gives to compute the chosen experts alone, and not every expert for every token.",
            "",
            "Made by `OMP_NUM_THREADS=1 python samples/measure/mixtures.py`.",
            "",
            "- The model has random weights: 4 layers, hidden 512, 64 experts of width 256. "
            "Each token takes 8 of them.",
            f"- A cell holds the least and the median of {results.facts['repeats']} runs, a sixth of that for prefill.",
            "- Both graphs run in turns. The time is what one core spent on the run.",
            f"- A decode step has {CACHED} tokens in its cache.",
            "- The difference is relative to the largest logit.",
            "- Both graphs round the inputs of their matrices to int8. A number in the middle may fall to either side.",
            "",
            harness.table(head, lines, "llrrrr"),
            "",
            "Rows of INT4 in blocks of 128 come twice: so an answer does not depend on the other requests. That is why "
            "its prefill gains less. See [the engine](../explanation/engine.md).",
            "",
        ]
    )


def both(values: Row, form: str) -> str:
    """Return the least and the median of a cell."""
    return " / ".join(form.format(values[kind]) for kind in ("least", "median"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the formats that are missing."""
    parser = harness.parser(__doc__, "rows")
    parser.add_argument("--repeats", type=int, default=60)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    results = Results(args.out, "mixtures", {"repeats": args.repeats})
    results.measure(wanted(args.repeats), args.rows)
    results.write_page(page(results))


if __name__ == "__main__":
    sys.exit(main())

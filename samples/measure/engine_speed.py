"""How fast many requests are together: our engine, ONNX Runtime GenAI's engine and one request after another.

    python samples/measure/engine_speed.py OUT

All run the same bundle in one process, greedy, and take turns within a round. Ratios are those of one round. Writes
docs/results/engine.json and engine.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported
sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

import deploy_genai_engine
import numpy as np
import onnxruntime_genai as og
from measure import harness, served
from measure.harness import Measure, Results, Row

from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import Engine, EngineOptions, Request

PROMPT_TOKENS, NEW_TOKENS = 32, 64
ENGINE, GENAI, ALONE = "rk-export's engine", "GenAI's engine", "one after another"
Run = Callable[[list[list[int]]], int]


def measure(args: argparse.Namespace, requests: int) -> Row:
    """Return the row of a number of requests: tokens per second of each engine in each round."""
    session = Session.from_pretrained(args.bundle, provider="cpu", threads=args.threads)
    engine = Engine(session, EngineOptions(slots=requests, capacity=256, kept_prefixes=0))
    ways: dict[str, Run] = {
        ENGINE: partial(_ours, engine),
        GENAI: partial(_genai, _genai_model(args)),
        ALONE: partial(_alone, session),
    }
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(args.rounds + 1):
        prompts = served.prompts(args.bundle, requests, PROMPT_TOKENS, PROMPT_TOKENS, seed=number)
        order = list(ways) if number % 2 else list(reversed(ways))
        for way in order:
            begin = time.perf_counter()
            tokens = ways[way](prompts)
            if number:  # the first round pays for what is made once
                speeds[way].append(tokens / (time.perf_counter() - begin))
    engine.close()
    return {"requests": requests, "speeds": speeds, "load": served.load_average()}


def _ours(engine: Engine, prompts: list[list[int]]) -> int:
    options = GenerationOptions(max_new_tokens=NEW_TOKENS)
    answers = engine.generate([Request(tuple(prompt), options) for prompt in prompts])
    return sum(len(answer.token_ids) for answer in answers)


def _alone(session: Session, prompts: list[list[int]]) -> int:
    """Run each prompt through a decoder without slots, to the same ends."""
    count = 0
    for prompt in prompts:
        decoder = session.decoder(batch=1, capacity=256)
        row = session.row(prompt, GenerationOptions(max_new_tokens=NEW_TOKENS))
        logits = decoder.prefill(np.array([prompt], np.int64))
        while row.advance(logits[0]) is not None and row.finish_reason is None:
            logits = decoder.step(np.array(row.tokens[-1:]))
        count += len(row.tokens)
    return count


def _genai_model(args: argparse.Namespace) -> og.Model:
    config = og.Config(str(args.bundle))
    options = {"intra_op_num_threads": args.threads} if args.threads else {}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
    return og.Model(config)


def _genai(model: og.Model, prompts: list[list[int]]) -> int:
    return sum(map(len, deploy_genai_engine.answers(model, prompts, NEW_TOKENS)))


def _ratio(row: Row, way: str, other: str) -> float:
    pairs = zip(row["speeds"][way], row["speeds"][other], strict=True)
    return median(one / two for one, two in pairs)


def page(results: Results) -> str:
    """Return the page that docs/results shows."""
    lines = [
        (
            row["requests"],
            *(f"{median(row['speeds'][way]):.0f}" for way in (ENGINE, GENAI, ALONE)),
            *(f"{_ratio(row, ENGINE, way):.2f}" for way in (GENAI, ALONE)),
            row["load"],
        )
        for row in results.rows.values()
    ]
    head = ("requests", ENGINE, GENAI, ALONE, "ours / GenAI", "ours / alone", "load")
    facts = results.facts
    return "\n".join(
        [
            "# The engine: many requests together",
            "",
            "This page shows the speed of several requests at once, in tokens per second of all of them together.",
            "",
            f"Made by `python samples/measure/engine_speed.py OUT` on {facts['machine']}. The bundle is "
            f"{facts['bundle']}. Every prompt has {PROMPT_TOKENS} tokens, and every answer at most {NEW_TOKENS}. "
            f"Prompts count as time, not as tokens. The median of {facts['rounds']} rounds is shown. Load is the "
            "average of the last minute.",
            "",
            harness.table(head, lines, "rrrrrrr"),
            "",
            harness.reading(readings(results)),
            "",
        ]
    )


def readings(results: Results) -> list[str]:
    """Return what the rows show."""
    rows = list(results.rows.values())
    alone = next((row for row in rows if row["requests"] == 1), None)
    found = [
        f"{row['requests']} requests: {_ratio(row, ENGINE, GENAI):.2f} times GenAI's engine, "
        f"{_ratio(row, ENGINE, ALONE):.2f} times one request after another."
        for row in rows
    ]
    if alone is not None:
        one = median(alone["speeds"][ENGINE])
        found += [
            f"{row['requests']} requests give {median(row['speeds'][ENGINE]) / one:.2f} times the tokens of one."
            for row in rows
            if row["requests"] > 1
        ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the numbers of requests that are missing."""
    parser = harness.parser(__doc__)
    parser.add_argument("bundle", type=Path, help="decoder bundle")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    facts = {"bundle": args.bundle.name, "rounds": args.rounds, "machine": harness.machine()}
    results = Results(args.out, "engine", facts)
    wanted: list[tuple[str, Measure]] = [
        (f"{requests} requests", partial(measure, args, requests)) for requests in args.requests
    ]
    results.measure(wanted)
    results.write_page(page(results))


if __name__ == "__main__":
    sys.exit(main())

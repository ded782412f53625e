"""What guesses give: the speed of single requests with and without them, on three kinds of text.

    python samples/measure/speculation.py OUT --draft SMALL

Every request runs alone, greedy. The ways to run take turns at each prompt, and ratios are those of one prompt. Writes
docs/results/speculation.json and speculation.md.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Measure, Results, Row

from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.engine import Answer, Engine, EngineOptions, Request

NEW_TOKENS, ROUNDS, CAPACITY = 128, 3, 1024
PLAIN, LOOKUP, DRAFT = "no guesses", "lookup", "draft"
_STORY = (
    "The harbour was quiet in the early morning, and only the gulls moved between the masts. A woman in a grey coat "
    "walked along the quay, counted the boats, and wrote their names into a small notebook. At nine the ferry came, "
    "and with it the noise of the town: carts, bicycles, children on their way to school. The woman closed her "
    "notebook and went into the cafe at the corner, where the owner already knew what she wanted."
)
_REPORT = (
    "The committee met on Tuesday to discuss the budget for the coming year. Three members argued for a new library, "
    "two for repairs to the bridge, and the chair proposed that both should be paid for by a loan. After two hours the "
    "committee voted for the bridge, because the engineer had warned that it would not last another winter. The "
    "library will be discussed again in spring."
)
_CODE = """def median(values):
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2 == 1:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2
"""
_LOOP = """def total(orders):
    result = 0
    for order in orders:
        if order.paid:
            result = result + order.price * order.count
    return result
"""
QUESTIONS = {
    "summarizing": [
        f"Summarize this text in three sentences:\n{_STORY}",
        f"Summarize this text in three sentences:\n{_REPORT}",
        f"Repeat the facts of this text as a list:\n{_REPORT}",
    ],
    "code editing": [
        f"Rename the variable ordered to ranked in this function and show the whole function:\n```python\n{_CODE}```",
        f"Add a docstring to this function and show the whole function:\n```python\n{_LOOP}```",
        f"Add type hints to this function and show the whole function:\n```python\n{_CODE}```",
    ],
    "free text": [
        "Tell me a story about a lighthouse.",
        "Explain how bread is made.",
        "Write a letter to a friend about a journey by train.",
    ],
}


def measure(args: argparse.Namespace, kind: str) -> Row:
    """Return the row of a kind of text: speed, ratio and guesses of each way to run."""
    session = Session.from_pretrained(args.bundle, provider="cpu", threads=args.threads)
    ways = {PLAIN: Engine(session, EngineOptions(slots=1, capacity=CAPACITY, kept_prefixes=0))}
    lookup = EngineOptions(slots=1, capacity=CAPACITY, kept_prefixes=0, lookup=True)
    ways[LOOKUP] = Engine(session, lookup)
    if args.draft is not None:
        draft = Session.from_pretrained(args.draft, provider="cpu", threads=args.threads)
        ways[DRAFT] = Engine(session, EngineOptions(capacity=CAPACITY, kept_prefixes=0), draft)
    prompts = [session.chat_tokens([{"role": "user", "content": text}]) for text in QUESTIONS[kind]]
    speeds: dict[str, list[float]] = {way: [] for way in ways}
    answers: dict[str, list[Answer]] = {way: [] for way in ways}
    for number in range(ROUNDS + 1):
        for prompt in prompts:
            for way, engine in ways.items():
                request = Request(tuple(prompt), GenerationOptions(max_new_tokens=NEW_TOKENS))
                begin = time.perf_counter()
                (answer,) = engine.generate([request])
                if number:  # the first round pays for what is made once
                    speeds[way].append(len(answer.token_ids) / (time.perf_counter() - begin))
                    answers[way].append(answer)
    for engine in ways.values():
        engine.close()
    return {way: _figures(way, speeds, answers) for way in ways}


def _figures(way: str, speeds: dict[str, list[float]], answers: dict[str, list[Answer]]) -> Row:
    drafted = sum(answer.drafted_tokens for answer in answers[way])
    pairs = zip(answers[way], answers[PLAIN], strict=True)
    return {
        "tokens_per_second": median(speeds[way]),
        "ratio": median(one / other for one, other in zip(speeds[way], speeds[PLAIN], strict=True)),
        "drafted": drafted,
        "accepted": sum(answer.accepted_tokens for answer in answers[way]),
        "tokens": sum(len(answer.token_ids) for answer in answers[way]),
        "equal_to_plain": sum(one.token_ids == other.token_ids for one, other in pairs),
        "answers": len(answers[way]),
    }


def page(results: Results) -> str:
    """Return the page that docs/results shows."""
    lines = [
        (
            kind,
            way,
            f"{figures['tokens_per_second']:.0f}",
            f"{figures['ratio']:.2f}",
            "" if way == PLAIN else f"{figures['accepted']} of {figures['drafted']}",
            f"{figures['equal_to_plain']} of {figures['answers']}",
        )
        for kind, row in results.rows.items()
        for way, figures in row.items()
        if isinstance(figures, dict)
    ]
    head = ("text", "guesses", "tokens/s", "ratio", "right guesses", "equal to no guesses")
    facts = results.facts
    draft = "" if facts["draft"] is None else f" The draft is {facts['draft']}."
    return "\n".join(
        [
            "# Speculative decoding: what guesses give",
            "",
            "This page shows how fast one request at a time is with guesses and without them.",
            "",
            f"Made by `python samples/measure/speculation.py OUT --draft SMALL` on {facts['machine']}. The bundle is "
            f"{facts['bundle']}.{draft} Each kind of text has three questions and {ROUNDS} rounds. An answer has at "
            f"most {NEW_TOKENS} tokens, chosen greedily. The speed is that of the whole request, prompt included.",
            "",
            harness.table(head, lines, "--rrrr"),
            "",
            harness.reading(readings(results)),
            "",
        ]
    )


def readings(results: Results) -> list[str]:
    """Return what the rows show."""
    found = []
    for kind, row in results.rows.items():
        ways = {way: figures for way, figures in row.items() if isinstance(figures, dict) and way != PLAIN}
        best = max(ways, key=lambda way: ways[way]["ratio"])
        ratio = ways[best]["ratio"]
        verdict = f"{best} gives {ratio:.2f} times the speed" if ratio > 1 else "guesses lose time"
        found.append(f"{kind}: {verdict}.")
    found.append(
        "Guesses are off by default. An answer with them may differ from one without, since its tokens "
        "are computed in runs of at least two: see [the engine](../explanation/engine.md#guesses)."
    )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the kinds of text that are missing."""
    parser = harness.parser(__doc__)
    parser.add_argument("bundle", type=Path, help="decoder bundle with a chat template")
    parser.add_argument("--draft", type=Path, help="a smaller bundle with the same vocabulary")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    draft = None if args.draft is None else args.draft.name
    facts = {"bundle": args.bundle.name, "draft": draft, "machine": harness.machine()}
    results = Results(args.out, "speculation", facts)
    wanted: list[tuple[str, Measure]] = [(kind, partial(measure, args, kind)) for kind in QUESTIONS]
    results.measure(wanted)
    results.write_page(page(results))


if __name__ == "__main__":
    sys.exit(main())

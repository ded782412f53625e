"""Load test of `rk-export serve`: speed and delays at several numbers of clients.

    python samples/measure/serve_load.py OUT                    slots: running answers are decoded together
    python samples/measure/serve_load.py OUT --one-at-a-time    one slot, for comparison

Server and clients are processes on this machine and speak over loopback. Every request streams a completion at
temperature 0; no two prompts begin alike, so that none is taken from the prefix cache. Writes docs/results/serving.json
and serving.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness, served
from measure.harness import Measure, Results, Row

SHORTEST, LONGEST, NEW_TOKENS = 8, 120, 48
SLOTS, ONE = "slots", "one at a time"
_TIMEOUT = 600.0


def measure(args: argparse.Namespace, clients: int, variant: str) -> Row:
    """Return the row of one number of clients: a fresh server, and the clients in another process."""
    slots = 1 if variant == ONE else args.slots
    options: list[object] = ["--slots", slots, "--queue", 4 * clients, "--kept-prefixes", 0]
    options += [] if args.threads is None else ["--threads", args.threads]
    options += [] if args.chunk is None else ["--chunk", args.chunk]
    options += ["--no-spinning"] if args.no_spinning else []
    with served.server(args.bundle, *options) as server:
        words = ["--client", server.url, "--clients", clients, "--requests", args.requests]
        limits = ["--seconds", args.seconds, "--prompt-tokens", *args.prompt_tokens]
        row = harness.in_own_process(__file__, str(args.bundle), *map(str, [*words, *limits]))
    return {"variant": variant, "slots": slots, "clients": clients, **row, "load": served.load_average()}


async def ask(client: httpx.AsyncClient, prompt: list[int]) -> tuple[float, list[float], int]:
    """Return the seconds to the first token, those between pieces, and the number of new tokens."""
    begin, times, tokens = time.perf_counter(), [], 0
    options = {"stream": True, "stream_options": {"include_usage": True}}
    request = served.body(prompt, NEW_TOKENS, **options)
    async with client.stream("POST", "/v1/completions", json=request) as answer:
        answer.raise_for_status()
        async for moment, event in served.events(answer):
            if event["choices"] and event["choices"][0]["text"]:
                times.append(moment)
            if event["usage"] is not None:
                tokens = event["usage"]["completion_tokens"]
    first = (times[0] if times else time.perf_counter()) - begin
    return first, [float(gap) for gap in np.diff(times)], tokens


async def run_clients(args: argparse.Namespace) -> Row:
    """Let clients ask one request after another, until each has had its share or the time is up."""
    (clients,) = args.clients
    least, most = args.prompt_tokens
    pool = served.prompts(args.bundle, clients * args.requests + 1, least, most)
    found: list[tuple[float, list[float], int]] = []
    async with httpx.AsyncClient(base_url=args.client, timeout=_TIMEOUT) as client:
        await ask(client, pool.pop())  # the first request pays for what is made once
        begin = time.perf_counter()

        async def one() -> None:
            left = args.requests
            while left and time.perf_counter() - begin < args.seconds:
                found.append(await ask(client, pool.pop()))
                left -= 1

        await asyncio.gather(*(one() for _ in range(clients)))
        seconds = time.perf_counter() - begin
    return summary(found, seconds)


def summary(found: Sequence[tuple[float, list[float], int]], seconds: float) -> Row:
    """Return the figures of some answers."""
    first = [1e3 * answer[0] for answer in found]
    between = [1e3 * gap for answer in found for gap in answer[1]]
    tokens = sum(answer[2] for answer in found)
    row: dict[str, Any] = {"answers": len(found), "tokens": tokens, "tokens_per_second": tokens / seconds}
    for name, values in (("first", first), ("between", between)):
        p50, p99 = np.percentile(values or [0.0], [50, 99])
        row |= {f"{name}_p50_ms": float(p50), f"{name}_p99_ms": float(p99)}
    return row


def page(results: Results) -> str:
    """Return the page that docs/results shows."""
    rows = list(results.rows.values())
    lines = [
        (
            row["variant"],
            row["clients"],
            f"{row['tokens_per_second']:.0f}",
            *(f"{row[f'{kind}_p50_ms']:.0f} / {row[f'{kind}_p99_ms']:.0f}" for kind in ("first", "between")),
            row["answers"],
            row["load"],
        )
        for row in rows
    ]
    head = (
        "server",
        "clients",
        "tokens/s",
        "first token, p50 / p99 ms",
        "between, p50 / p99 ms",
        "answers",
        "load",
    )
    facts = results.facts
    return "\n".join(
        [
            "# Serving: speed and delays under load",
            "",
            "This page shows how fast `rk-export serve` answers several clients.",
            "",
            f"Made by `python samples/measure/serve_load.py OUT` on {facts['machine']}. The bundle is "
            f"{facts['bundle']}. "
            f"A prompt has {facts['prompt_tokens'][0]} to {facts['prompt_tokens'][1]} tokens. An answer has at most "
            f"{NEW_TOKENS}. Server and clients share the cores. Load is the average of the last minute: other work on "
            "the machine slows the figures.",
            "",
            harness.table(head, lines, "-rrrrrr"),
            "",
            harness.reading(readings(rows)),
            "",
        ]
    )


def readings(rows: Sequence[Row]) -> list[str]:
    """Return what the rows show."""
    speeds = {(row["variant"], row["clients"]): row["tokens_per_second"] for row in rows}
    found = [
        f"{clients} clients: slots give {speed / speeds[ONE, clients]:.1f} times the tokens of one at a time."
        for (variant, clients), speed in speeds.items()
        if variant == SLOTS and (ONE, clients) in speeds
    ]
    found += [
        f"{row['clients']} clients: the p99 between tokens is {row['between_p99_ms'] / row['between_p50_ms']:.1f} "
        "times the median."
        for row in rows
        if row["variant"] == SLOTS and row["between_p50_ms"] > 0
    ]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the numbers of clients that are missing."""
    parser = harness.parser(__doc__)
    parser.add_argument("bundle", type=Path, help="decoder bundle")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=6, help="of each client (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=120.0, help="none begins later (default %(default)s)"
    )
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--chunk", type=int, help="tokens of a prompt between two steps")
    parser.add_argument("--no-spinning", action="store_true", help="threads that wait sleep")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=[SHORTEST, LONGEST])
    parser.add_argument("--one-at-a-time", action="store_true", help="serve with one slot")
    parser.add_argument("--client", help=argparse.SUPPRESS)  # the address, in the process of the clients
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report; in the process of the clients, print a row."""
    if args.client is not None:
        print(json.dumps(asyncio.run(run_clients(args))))
        return
    facts = {"bundle": args.bundle.name, "machine": harness.machine(), "prompt_tokens": args.prompt_tokens}
    results = Results(args.out, "serving", {**facts, "new_tokens": NEW_TOKENS})
    variant = ONE if args.one_at_a_time else SLOTS
    wanted: list[tuple[str, Measure]] = [
        (f"{variant}, {clients} clients", partial(measure, args, clients, variant))
        for clients in args.clients
    ]
    results.measure(wanted)
    results.write_page(page(results))


if __name__ == "__main__":
    sys.exit(main())

"""Endurance test of `rk-export serve`: good, bad, slow, huge and aborted requests side by side.

python samples/measure/serve_soak.py OUT        ten minutes; writes docs/results/serving_soak.json and .md

Every whole answer at temperature 0 is compared with the answer that the runtime gives to the same prompt alone. The
status is 1 where an answer is lost, mixed up or changed, where a status is not the expected one, or where the server's
memory (RssAnon) grows by 5 % or more from the end of the warm-up to the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness, served
from measure.harness import Results, Row
from measure.memory_meter import resident

from rk_export.runtime import GenerationOptions, Session

CLIENTS, PROMPTS, MOST_GROWTH = 12, 12, 0.05
MAX_BODY = "200KB"
_WARM_UP = 0.2  # of the time
_TIMEOUT = 300.0
_BUSY = 429
# What is wrong with a body, and the status that says so.
BAD: tuple[tuple[dict[str, Any], int], ...] = (
    ({"temperature": -1}, 400),
    ({"max_tokens": "many"}, 400),
    ({"nonsense": True}, 400),
    ({"prompt": [10**9]}, 400),
    ({"prompt": []}, 400),
    ({"model": "absent"}, 404),
    ({"logit_bias": {"1": 5}}, 400),
    ({"stop": ["x" * 5000]}, 400),
)


@dataclass
class Soak:
    """One test.

    Args:
        url: The server.
        pool: Prompts and the answers that each gets alone.
        new_tokens: Of an answer.
        room: Positions of the context.
        rng: Chooses.
        counts: Requests by kind and what became of them.
        wrong: What must not have happened.
    """

    url: str
    pool: list[tuple[list[int], str]]
    new_tokens: int
    room: int
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, kind: str, status: int, expected: int, problem: str = "") -> None:
        """Count a request; one that had to wait for a place is no failure."""
        self.counts[f"{kind}: {status}"] += 1
        if status not in (expected, _BUSY) or (problem and status == expected):
            self.wrong.append(f"{kind}: status {status}, {problem or 'unexpected'}")


Kind = Callable[[Soak, httpx.AsyncClient], Awaitable[None]]


async def whole(soak: Soak, client: httpx.AsyncClient) -> None:
    """Ask for an answer in one piece."""
    prompt, expected = soak.rng.choice(soak.pool)
    answer = await client.post("/v1/completions", json=served.body(prompt, soak.new_tokens))
    text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""
    soak.note("whole", answer.status_code, 200, "" if text == expected else "another answer")


async def streamed(soak: Soak, client: httpx.AsyncClient, *, pause: float = 0.0) -> None:
    """Ask for a stream; a slow client pauses at every piece."""
    prompt, expected = soak.rng.choice(soak.pool)
    body, text = served.body(prompt, soak.new_tokens, stream=True), ""
    kind = "slow reader" if pause else "streamed"
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code == 200:
            async for _, event in served.events(answer):
                text += event["choices"][0]["text"]
                await asyncio.sleep(pause)
        soak.note(kind, answer.status_code, 200, "" if text == expected else "another answer")


async def slow_writer(soak: Soak, client: httpx.AsyncClient) -> None:
    """Send a body bit by bit."""
    prompt, expected = soak.rng.choice(soak.pool)
    data = json.dumps(served.body(prompt, soak.new_tokens)).encode()

    async def parts() -> Any:
        for start in range(0, len(data), 200):
            yield data[start : start + 200]
            await asyncio.sleep(0.05)

    headers = {"Content-Type": "application/json"}
    answer = await client.post("/v1/completions", content=parts(), headers=headers)
    text = answer.json()["choices"][0]["text"] if answer.status_code == 200 else ""
    soak.note("slow writer", answer.status_code, 200, "" if text == expected else "another answer")


async def several(soak: Soak, client: httpx.AsyncClient) -> None:
    """Ask for the answers to three prompts at once."""
    chosen = soak.rng.sample(soak.pool, 3)
    body = {**served.body([], soak.new_tokens), "prompt": [prompt for prompt, _ in chosen]}
    answer = await client.post("/v1/completions", json=body)
    found = [choice["text"] for choice in answer.json().get("choices", ())]
    same = found == [expected for _, expected in chosen]
    soak.note("several", answer.status_code, 200, "" if same else "another answer")


async def bad(soak: Soak, client: httpx.AsyncClient) -> None:
    """Send what is refused."""
    changes, status = soak.rng.choice(BAD)
    answer = await client.post("/v1/completions", json={**served.body([1, 2], 4), **changes})
    soak.note("bad", answer.status_code, status)


async def garbage(soak: Soak, client: httpx.AsyncClient) -> None:
    """Send what is no JSON."""
    content = soak.rng.randbytes(soak.rng.randrange(1, 5000))
    headers = {"Content-Type": "application/json"}
    answer = await client.post("/v1/chat/completions", content=content, headers=headers)
    soak.note("garbage", answer.status_code, 400)


async def huge(soak: Soak, client: httpx.AsyncClient) -> None:
    """Send a body, or a prompt, that is too large."""
    if soak.rng.random() < 0.5:
        content = b'{"model": "' + b"x" * 300_000 + b'"}'
        answer = await client.post(
            "/v1/completions", content=content, headers={"Content-Type": "application/json"}
        )
        soak.note("huge body", answer.status_code, 413)
        return
    answer = await client.post("/v1/completions", json=served.body([5] * (soak.room + 1), 4))
    soak.note("huge prompt", answer.status_code, 400)


async def aborted(soak: Soak, client: httpx.AsyncClient) -> None:
    """Leave before the answer is there."""
    prompt, _ = soak.rng.choice(soak.pool)
    body = served.body(prompt, soak.new_tokens, stream=soak.rng.random() < 0.5)
    try:
        async with asyncio.timeout(soak.rng.uniform(0.005, 0.3)):
            await client.post("/v1/completions", json=body)
    except TimeoutError:
        soak.counts["aborted: left"] += 1
    else:
        soak.counts["aborted: too late"] += 1


async def looked_at(soak: Soak, client: httpx.AsyncClient) -> None:
    """Look at the probes and the figures."""
    for path in ("/health/ready", "/metrics", "/v1/models"):
        answer = await client.get(path)
        soak.note("looked at", answer.status_code, 200)


KINDS: tuple[tuple[Kind, int], ...] = (
    (whole, 6),
    (streamed, 6),
    (partial(streamed, pause=0.02), 2),
    (slow_writer, 2),
    (several, 2),
    (bad, 4),
    (garbage, 2),
    (huge, 2),
    (aborted, 6),
    (looked_at, 1),
)


async def run_clients(soak: Soak, pid: int, seconds: float) -> list[int]:
    """Let clients ask until the time is up; return the server's memory over the time, in bytes."""
    end, samples = time.monotonic() + seconds, []
    kinds, weights = zip(*KINDS, strict=True)

    async def one() -> None:
        # An aborted request closes its connection: every request has its own.
        while time.monotonic() < end:
            kind = soak.rng.choices(kinds, weights)[0]
            async with httpx.AsyncClient(base_url=soak.url, timeout=_TIMEOUT) as client:
                try:
                    await kind(soak, client)
                except (httpx.HTTPError, RuntimeError) as error:
                    soak.wrong.append(f"lost: {type(error).__name__} {error}")

    async def watch() -> None:
        while time.monotonic() < end:
            samples.append(resident([pid])[0])
            await asyncio.sleep(min(1.0, seconds / 40))

    await asyncio.gather(watch(), *(one() for _ in range(CLIENTS)))
    return samples


def references(bundle: Path, new_tokens: int, most: int, threads: int | None) -> list[tuple[list[int], str]]:
    """Return prompts and what the runtime answers to each alone."""
    session = Session.from_pretrained(bundle, provider="cpu", threads=threads)
    options = GenerationOptions(max_new_tokens=new_tokens)
    pool = served.prompts(bundle, PROMPTS, 8, most)
    return [(prompt, session.generate([prompt], options=options)[0].text) for prompt in pool]


def measure(args: argparse.Namespace) -> Row:
    """Return what came of the whole time."""
    threads = () if args.threads is None else ("--threads", args.threads)
    pool = references(args.bundle, args.new_tokens, args.prompt_tokens, args.threads)
    options = ("--slots", 8, "--queue", 8, "--context", args.context, "--max-body", MAX_BODY)
    with served.server(args.bundle, *options, *threads) as server:
        soak = Soak(server.url, pool, args.new_tokens, args.context, random.Random(0))
        samples = asyncio.run(run_clients(soak, server.pid, args.minutes * 60))
        left = await_idle(server.url)
    if left:
        soak.wrong.append(f"{left} requests were never ended")
    warm = samples[int(len(samples) * _WARM_UP) :]
    tenth = max(1, len(warm) // 10)
    begin, end = median(warm[:tenth]), median(warm[-tenth:])
    return {
        "requests": sum(soak.counts.values()),
        "counts": dict(sorted(soak.counts.items())),
        "wrong": soak.wrong[:20],
        "wrong_count": len(soak.wrong),
        "rss_anon_begin": int(begin),
        "rss_anon_end": int(end),
        "growth": end / begin - 1,
        "load": served.load_average(),
    }


def await_idle(url: str) -> int:
    """Return how many requests the engine still has half a minute after the last one came."""
    end = time.monotonic() + 30
    while True:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        left = sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith(("rk_export_requests_running{", "rk_export_requests_waiting{"))
        )
        if left == 0 or time.monotonic() > end:
            return int(left)
        time.sleep(0.1)


def page(results: Results) -> str:
    """Return the page that docs/results shows."""
    facts = results.facts
    parts = [
        "# Serving: ten minutes of everything",
        "",
        "This page shows whether `rk-export serve` stays right and small through good, bad, slow, huge and "
        "aborted requests.",
        "",
        f"Made by `python samples/measure/serve_soak.py OUT` on {facts['machine']}. The bundle is {facts['bundle']}. "
        f"{facts['clients']} clients ask side by side. Every whole answer at temperature 0 is compared with the answer "
        "that the runtime gives to the same prompt alone.",
    ]
    for key, row in results.rows.items():
        lines = [(*name.rsplit(": ", 1), count) for name, count in row["counts"].items()]
        memory = " to ".join(f"{row[f'rss_anon_{when}'] / 1e6:,.0f}" for when in ("begin", "end"))
        parts += [
            "",
            f"## {key}",
            "",
            harness.table(("kind of request", "status", "requests"), lines, "-rr"),
            "",
            harness.reading(
                [
                    f"{row['requests']:,} requests came, and {row['wrong_count']} ended otherwise than they should.",
                    f"The server's memory (RssAnon) went from {memory} MB, {row['growth']:+.1%}, after the warm-up.",
                ]
            ),
        ]
    return "\n".join([*parts, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the test."""
    parser = harness.parser(__doc__)
    parser.add_argument("bundle", type=Path, help="decoder bundle")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, help="of ONNX Runtime")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, default=120, help="of the longest prompt")
    parser.add_argument("--context", type=int, default=512)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> int:
    """Measure and report."""
    facts = {"bundle": args.bundle.name, "machine": harness.machine(), "clients": CLIENTS}
    results = Results(args.out, "serving_soak", facts)
    key = f"{args.minutes:g} minutes"
    results.measure([(key, partial(measure, args))])
    results.write_page(page(results))
    row = results.rows[key]
    passed = row["wrong_count"] == 0 and row["growth"] < MOST_GROWTH
    harness.logger.info(
        "%d requests, %d wrong, memory %+.1f %%", row["requests"], row["wrong_count"], 100 * row["growth"]
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

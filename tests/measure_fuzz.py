"""Hostile files at large: damaged files of every kind are opened as a user opens them.

    python tests/measure_fuzz.py --cases 100000 --seed 0          every kind, one process a kind
    python tests/measure_fuzz.py --kind recipe GGUF --cases 1000  some kinds; the rows of the others stay
    python tests/measure_fuzz.py --kind recipe --only 4711        one case, with its traceback

A case fails if anything else than an `RkExportError` comes out, if it takes more than 5 s of processor time, if it
needs more than 1 GiB, or if it opens a file outside its folder. A process that dies or hangs is a failure of the case
that it was at, and another process goes on behind it. Writes ``docs/results/fuzz.json``, one row a kind, and
``fuzz.md`` from it. Ends with status 1 if a case fails.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fuzz_cases.guard import Guard, Outcome
from fuzz_cases.kinds import KINDS, Place, generator

RESULTS = Path(__file__).parents[1] / "docs" / "results"
STUCK = 90  # seconds without an end of a case, after which its process is ended
REPORTED = 250  # cases between two lines of a process
EXAMPLES = 3  # cases that are named of each failure
WARM_UP = 20  # cases before the limits hold, so that what libraries load at first use is loaded
_SECRETS = {
    "secret.bin": bytes(4096),
    "secret.json": b"{}",
    "secret.txt": b"secret",
    "model.safetensors": bytes(64),
}

logger = logging.getLogger("fuzz")


@dataclass
class Row:
    """What came of one kind.

    Args:
        kind: Its name.
        seed: Of the generator of every case.
        cases: How many were run.
        taken: Those that were read in spite of the damage.
        refused: Those that ended with a message of ours.
        places: Lines of the code that refused some.
        failures: Numbers of the failed cases by what is wrong.
        seconds: That all took.
    """

    kind: str
    seed: int
    cases: int = 0
    taken: int = 0
    refused: int = 0
    places: set[str] = field(default_factory=set)
    failures: dict[str, list[int]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, number: int, outcome: Outcome) -> None:
        """Count a case."""
        self.cases += 1
        if outcome.kind == "taken":
            self.taken += 1
        elif outcome.kind == "refused":
            self.refused += 1
            self.places.add(outcome.what)
        else:
            self.fail(number, outcome.what, outcome.details)

    def fail(self, number: int, what: str, details: str) -> None:
        """Note a failed case; the first of a kind is told."""
        if what not in self.failures:
            logger.error("%s, case %d: %s\n%s", self.kind, number, what, details)
        self.failures.setdefault(what, []).append(number)

    def to_json(self) -> dict[str, Any]:
        """Return the row of the results."""
        failures = {what: numbers[:EXAMPLES] for what, numbers in self.failures.items()}
        failed = sum(map(len, self.failures.values()))
        return asdict(self) | {
            "places": len(self.places),
            "failed": failed,
            "failures": failures,
            "seconds": round(self.seconds),
        }


class Cases:
    """Makes and runs cases in this process, under limits.

    Args:
        root: A folder of its own, empty.
        seed: Of every case's generator.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self._seed, self._given, outside = seed, root / "given", root / "outside"
        for folder in (self._given, outside):
            folder.mkdir(parents=True, exist_ok=True)
        for name, data in _SECRETS.items():
            (outside / name).write_bytes(data)
        absolute = [str(outside / name) for name in _SECRETS]
        self._outside = [*absolute, *(f"../../../outside/{name}" for name in _SECRETS)]
        self._guard = Guard(self._given, outside)

    def run(self, kind: str, numbers: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
        """Yield the number and the outcome of each case."""
        folder = self._given / kind.replace(" ", "-")
        folder.mkdir()
        make = KINDS[kind](Place(folder, self._outside))
        for number in range(-WARM_UP, 0):
            _quietly(make(generator(self._seed, kind, number)))
        with self._guard.memory_limited():
            for number in numbers:
                case = make(generator(self._seed, kind, number))
                faulthandler.dump_traceback_later(STUCK, exit=True)
                outcome = self._guard.run(case)
                faulthandler.cancel_dump_traceback_later()
                yield number, outcome


def _quietly(case: Callable[[], object]) -> None:
    try:
        case()
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise


def work(kind: str, first: int, last: int, seed: int, root: Path) -> None:
    """Run cases and print one line of JSON for each; libraries print elsewhere."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    lines: list[str] = []
    for number, outcome in Cases(root, seed).run(kind, range(first, last)):
        (root / "at").write_text(str(number + 1))
        lines.append(json.dumps([number, asdict(outcome)]))
        if len(lines) == REPORTED or number + 1 == last or outcome.kind == "failed":
            print("\n".join(lines), file=told)
            lines = []


def measure(kind: str, cases: int, seed: int, seconds: float) -> Row:
    """Run the cases of a kind, in another process wherever one dies; stop after some seconds."""
    row, start, at = Row(kind, seed), time.monotonic(), 0
    while at < cases and row.seconds < seconds:
        with tempfile.TemporaryDirectory(prefix="rk-fuzz-", dir=_memory_disk()) as folder:
            root = Path(folder)
            status = _run_process(row, (at, cases), root, start + seconds)
            row.seconds = time.monotonic() - start
            at = row.cases
            if status == 0 or row.seconds >= seconds:
                continue
            reached = root / "at"
            if not reached.is_file():
                raise RuntimeError(
                    f"{kind}: no case ran\n{(root / 'stderr').read_text(errors='replace')[-3000:]}"
                )
            died = int(reached.read_text() or at)
            row.cases = at = died + 1  # cases whose lines were lost were neither taken nor refused
            row.fail(died, f"the process ends with status {status}", (root / "stderr").read_text()[-3000:])
    return row


def _run_process(row: Row, numbers: tuple[int, int], root: Path, until: float) -> int:
    """Run cases in one process; count what it tells, and return its status."""
    temporary = root / "given" / "tmp"
    temporary.mkdir(parents=True)
    places = dict.fromkeys(("TMPDIR", "RK_EXPORT_CACHE", "HF_HOME", "MPLCONFIGDIR"), str(temporary))
    single = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")
    others = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "ORT_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, __file__, "--work", row.kind, *map(str, (*numbers, row.seed, root))]
    with (root / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=os.environ | places | single | others,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            number, outcome = json.loads(line)
            row.add(number, Outcome(**outcome))
            if row.cases % 5000 == 0:
                logger.info("%s: %d cases", row.kind, row.cases)
            if time.monotonic() > until:
                process.kill()
        return process.wait()


def together(kinds: Sequence[str], cases: int, seed: int) -> list[Row]:
    """Run the cases of all kinds in this process, for a quick look."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="rk-fuzz-", dir=_memory_disk()) as folder:
        tempfile.tempdir = str(Path(folder) / "given")
        run = Cases(Path(folder), seed)
        for kind in kinds:
            row, start = Row(kind, seed), time.monotonic()
            for number, outcome in run.run(kind, range(cases)):
                row.add(number, outcome)
            row.seconds = time.monotonic() - start
            rows.append(row)
    return rows


def _memory_disk() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what was asked for; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000, help="of each kind (default 100,000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of each kind at most")
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument(
        "--together", action="store_true", help="run all kinds in one process and write no results"
    )
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.work:
        kind, first, last, seed, root = args.work
        work(kind, int(first), int(last), int(seed), Path(root))
        return 0
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    if args.only is not None:
        with tempfile.TemporaryDirectory(prefix="rk-fuzz-") as folder:
            for _, outcome in Cases(Path(folder), args.seed).run(args.kind[0], [args.only]):
                print(outcome.kind, outcome.what, outcome.details, sep="\n")
        return 0
    if args.together:
        rows = together(args.kind, args.cases, args.seed)
    else:
        rows = []
        for kind in args.kind:
            rows.append(measure(kind, args.cases, args.seed, args.seconds))
            pass
    for row in rows:
        print(json.dumps(row.to_json()))
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())

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
from importlib import metadata
from pathlib import Path
from typing import Any

from fuzz_cases.guard import SECONDS, Guard, Outcome
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

LIBRARIES = ("rk-export", "transformers", "tokenizers", "safetensors", "gguf", "onnx", "pyyaml", "pydantic")
# What the cases, and the reading of the code for them, brought to light.
MENDED = (
    "A config with 2^63 layers ran without an end: transformers makes an object of each layer, label and head. Such "
    "numbers are refused from the text of the file, and more layers than there are tensors before one is built.",
    "A tokenizer without its own unknown token ended `encode` with a bare exception of its library. Panics of that "
    "library passed every `except Exception`. Both are messages that name the file.",
    "A number that is no finite one among the ids of added tokens ended with an `OverflowError`.",
    "External data with `..`, absolute names, links and lengths beyond the file reached ONNX Runtime. They are refused "
    "before.",
    "A link in a model folder was followed when tokenizer files were copied, so that a private file could get into a "
    "bundle.",
    "A header of 80 MB in a safetensors file took 1.5 GB. Headers beyond 32 MiB are refused.",
    "JSON files were read whatever their size and depth. One reader with bounds reads all of them.",
    "A recipe of 1 MB would take about 10 s (10 microseconds a byte). Recipes have at most 100,000 bytes.",
)

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
        places_before: How many such lines an earlier part of the run found.
        failures: Numbers of the failed cases by what is wrong.
        seconds: That all took.
    """

    kind: str
    seed: int
    cases: int = 0
    taken: int = 0
    refused: int = 0
    places: set[str] = field(default_factory=set)
    places_before: int = 0
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
        row = asdict(self)
        row["places"] = max(len(row["places"]), row.pop("places_before"))
        return row | {
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


def measure(row: Row, cases: int, seconds: float) -> Row:
    """Run the cases of a kind from where its row ends, in another process wherever one dies.

    Args:
        row: What is there already; it is counted on.
        cases: Where to end.
        seconds: How long at most.
    """
    kind, before, start, at = row.kind, row.seconds, time.monotonic(), row.cases
    while at < cases and time.monotonic() - start < seconds:
        with tempfile.TemporaryDirectory(prefix="rk-fuzz-", dir=_memory_disk()) as folder:
            root = Path(folder)
            status = _run_process(row, (at, cases), root, start + seconds)
            row.seconds = before + time.monotonic() - start
            at = row.cases
            if status == 0 or time.monotonic() - start >= seconds:
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


def save(row: Row, folder: Path) -> None:
    """Put a row in the place of its kind's, and write the page anew."""
    path = folder / "fuzz.json"
    found = {one["kind"]: one for one in _saved(folder)} | {row.kind: row.to_json()}
    rows = [found[kind] for kind in KINDS if kind in found]
    data = {"versions": versions(), "rows": rows}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "fuzz.md").write_text(page(data), encoding="utf-8")


def _saved(folder: Path) -> list[dict[str, Any]]:
    path = folder / "fuzz.json"
    rows: list[dict[str, Any]] = (
        json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    )
    return rows


def begun(kind: str, seed: int, folder: Path) -> Row:
    """Return the row of an earlier run to go on with, or an empty one."""
    for row in _saved(folder):
        if (row["kind"], row["seed"]) == (kind, seed):
            counts = {name: row[name] for name in ("cases", "taken", "refused", "failures", "seconds")}
            return Row(kind, seed, **counts, places_before=row["places"])
    return Row(kind, seed)


def versions() -> dict[str, str]:
    """Return the versions of the libraries that read the files."""
    return {name: metadata.version(name) for name in LIBRARIES}


def page(data: dict[str, Any]) -> str:
    """Return the page of the results."""
    rows = data["rows"]
    total, failed = (sum(row[name] for row in rows) for name in ("cases", "failed"))
    lines = [
        "# Hostile files",
        "",
        "This page shows the end of files that were damaged at random. The checks of rk-export are listed in",
        "[safety](../explanation/safety.md#files-from-strangers).",
        "",
        f"There were {total:,} cases, and {failed:,} of them failed. A case is a valid file with one to four changes.",
        "Values, structure and bytes are changed: huge and negative numbers, other types, names of files",
        "elsewhere, links and pipes, deep nesting, long lists, cut and doubled bytes. Then the function that a user",
        "reaches opens the file. A case fails in four ways:",
        "",
        "- Something else than an error of rk-export comes out.",
        f"- It takes more than {SECONDS:.0f} s of processor time.",
        "- It needs more than 1 GiB of memory.",
        "- It opens or changes a file outside its folder. Linux tells when a file of a guarded folder is opened.",
        "",
        "*Refused* cases end with a message, *taken* ones are read in spite of the damage. *Lines* counts the places",
        "in the code that refused a case. The seed and the number of a case make it again.",
        "",
        "| file | cases | seed | refused | taken | failed | lines | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {row['kind']} | {row['cases']:,} | {row['seed']} | {row['refused']:,} | {row['taken']:,} "
            f"| {row['failed']:,} | {row['places']} | {row['seconds']:,} |"
            for row in rows
        ),
        "",
        "```bash",
        "python tests/measure_fuzz.py --cases 100000 --seed 0",
        "```",
        "",
        "With `--seconds` each kind ends after that time, and with `--go-on` a later run counts on from there. The",
        "seconds were measured on two cores that had other work. The test suite runs 200 cases of each kind.",
        "",
        "Two things are not damaged. A recipe may name a text anywhere on the machine, because reading it is what a",
        "recipe asks for. The graph in `model.onnx` stays valid apart from its external data.",
        "",
        "## What was found and mended",
        "",
        *(f"- {one}" for one in MENDED),
        "",
        "Versions: " + ", ".join(f"{name} {number}" for name, number in data["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


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
    parser.add_argument("--go-on", action="store_true", help="count on from the rows of the same seed")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="where the results go")
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
            row = begun(kind, args.seed, args.output) if args.go_on else Row(kind, args.seed)
            rows.append(measure(row, args.cases, args.seconds))
            save(row, args.output)
    for row in rows:
        print(json.dumps(row.to_json()))
    return int(any(row.failures for row in rows))


if __name__ == "__main__":
    sys.exit(main())

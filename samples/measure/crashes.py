"""What is left of a compression that a real end met, and whether the same command makes the same bundle of it.

    python samples/measure/crashes.py                                two layers of SmolLM2's shape, every row
    python samples/measure/crashes.py --model DIR --rows 'kill*'     another model, kill -9 alone

Every row is one story. A compression runs in a process of its own, beside a cache of its own, and something happens to
it at a line of its log: `kill -9` after a random moment, a full disk, a damaged file. Then the same command runs again.
Its bundle must have the bytes of a run that nothing happened to, but for the files that tell times.

A full disk is a tmpfs that a file fills while the process is stopped. To mount it takes root; without that right those
rows are left out, with a line. Writes docs/results/crashes.json and crashes.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness, memory_meter, shapes
from measure.harness import Measure, Results, Row, Rows

from rk_export import InputError

COMMAND = (sys.executable, "-m", "rk_export.cli.main", "compress")
WHOLE = "uninterrupted"
DATED = ("report.json", "report.html", "rk_manifest.json", "README.md")  # they tell times
FULL_AT = ("calibrate", "rewrite", "export")
SIGKILL = -int(signal.SIGKILL)
LEFT_FREE = 1 << 14  # bytes of a disk that is as good as full
FULL_DISK = "no space left on the disk"
GOING_ON = "going on with an unfinished run: "


@dataclass
class Process:
    """A compression that runs, with its log.

    Args:
        command: The words.
        cache: Its cache.
    """

    command: Sequence[str]
    cache: Path
    lines: list[tuple[float, str]] = field(default_factory=list)
    _came: threading.Condition = field(default_factory=threading.Condition)
    _ended: bool = False

    def __post_init__(self) -> None:
        env = os.environ | {"RK_EXPORT_CACHE": str(self.cache), "ORT_DISABLE_TELEMETRY": "1"}
        self._begin = time.monotonic()
        self._process = subprocess.Popen(
            list(self.command),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            start_new_session=True,  # so that a signal reaches its children, too
        )
        assert self._process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    @property
    def id(self) -> int:
        """Its number."""
        return self._process.pid

    @property
    def log(self) -> str:
        """What it said until now."""
        return "\n".join(line for _, line in self.lines)

    def _read(self, log: IO[str]) -> None:
        for line in log:
            with self._came:
                self.lines.append((time.monotonic() - self._begin, line.rstrip("\n")))
                self._came.notify_all()
        with self._came:
            self._ended = True
            self._came.notify_all()

    def said(self, text: str, count: int = 1) -> bool:
        """Wait for the n-th line that begins with a text; return False where the process ended without it."""

        def found() -> bool:
            return sum(line.startswith(text) for _, line in self.lines) >= count

        with self._came:
            self._came.wait_for(lambda: found() or self._ended)
            return found()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to it and its children, unless it has ended."""
        if self.runs:
            os.killpg(self._process.pid, number)

    @property
    def runs(self) -> bool:
        """Whether it still does."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Return how it ended."""
        status = self._process.wait()
        self._reader.join()
        return status

    def kill(self) -> int:
        """Kill it and return how it ended."""
        self.send(signal.SIGKILL)
        return self.wait()


@dataclass(frozen=True)
class Crashes:
    """Where the stories happen.

    Args:
        model: The folder of the model.
        work: Folder of everything that is made; each row has one of its own, deleted once it is measured.
        options: Options of `rk-export compress`.
        whole: The row of the run that nothing happened to, once it is known.
        points: How many runs are killed.
        seed: Of the moments at which they are.
    """

    model: Path
    work: Path
    options: Sequence[str]
    whole: Callable[[], Row]
    points: int
    seed: int

    def rows(self) -> Iterator[tuple[str, Measure]]:
        """Yield every row; the uninterrupted run comes first."""
        yield WHOLE, partial(self.in_folder, self.uninterrupted)
        for number in range(self.points):
            yield f"kill-{number + 1:02}", partial(self.in_folder, partial(self.killed, number))
        if can_mount():
            for stage in FULL_AT:
                yield f"full-{stage}", partial(self.in_folder, partial(self.full, stage))
        else:
            harness.logger.info("rows of a full disk are left out: no file system can be mounted here")
        stories = {
            "damaged-layer": self.damaged,
            "changed-source": self.changed,
            "two-processes": self.two,
            "stale-lock": self.stale,
        }
        for name, story in stories.items():
            yield name, partial(self.in_folder, story)

    def in_folder(self, story: Callable[[Path], Row]) -> Row:
        """Run a story in a folder of its own."""
        folder = self.work / "story"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            return story(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def start(self, folder: Path, model: Path | None = None) -> Process:
        """Start the command."""
        words = (*COMMAND, str(model or self.model), "-o", str(folder / "out"), *self.options)
        return Process(words, folder / "cache")

    def again(self, folder: Path, model: Path | None = None) -> Row:
        """Run the command again; return how it ended, what it went on from, and whether the bundle is the same."""
        begin = time.monotonic()
        process = self.start(folder, model)
        status = process.wait()
        found = [line.removeprefix(GOING_ON) for _, line in process.lines if line.startswith(GOING_ON)]
        files = checksums(folder / "out")
        expected = self.whole()["files"]
        is_same = status == 0 and files == expected
        return {
            "again_status": status,
            "again_seconds": round(time.monotonic() - begin, 1),
            "went_on_from": found[0] if found else "",
            "made_again": [without_folders(line) for _, line in process.lines if " is made again" in line],
            "identical": is_same,
            "different": sorted(
                name for name in {*files, *expected} if files.get(name) != expected.get(name)
            ),
            "left": sorted(
                path.name for path in folder.iterdir() if path.name not in ("out", "cache", "model")
            ),
            **({} if is_same else {"log": process.log[-2000:]}),
        }

    def uninterrupted(self, folder: Path) -> Row:
        """Run without an interruption."""
        process = self.start(folder)
        if status := process.wait():
            raise InputError(
                f"the compression ended with {status}: {process.log[-2000:]}", where=str(self.model)
            )
        return {"files": checksums(folder / "out"), "lines": process.lines, "passed": True}

    def killed(self, number: int, folder: Path) -> Row:
        """Kill a run at a random moment; the runs take turns in the stages."""
        line, count, delay = kill_point(self.whole()["lines"], number, self.seed)
        process = self.start(folder)
        if process.said(line, count):
            time.sleep(delay)
        status = process.kill()
        said = [text for _, text in process.lines if memory_meter.STAGE.match(text)]
        row = {"stage": said[-1].partition(":")[0] if said else "", "line": line, "delay": round(delay, 3)}
        row |= {"status": status, **self.again(folder)}
        return row | {"passed": status in (SIGKILL, 0) and row["identical"] and not row["left"]}

    def full(self, stage: str, folder: Path) -> Row:
        """Fill the disk at the beginning of a stage, then free it again."""
        disk, filler = folder / "disk", folder / "disk" / "filler"
        with mounted(disk, self.whole_bytes()):
            process = self.start(disk)
            if process.said(f"{stage}: "):
                process.send(signal.SIGSTOP)
                fill(filler)
                process.send(signal.SIGCONT)
            status = process.wait()
            row = {"stage": stage, "status": status, "message": message(process)}
            filler.unlink(missing_ok=True)
            row |= self.again(disk)
        is_clear = status == 2 and FULL_DISK in process.log and "Traceback" not in process.log
        return row | {"passed": is_clear and row["identical"] and not row["left"]}

    def whole_bytes(self) -> int:
        """Return a size of a disk that everything fits on."""
        model = sum(path.stat().st_size for path in self.model.iterdir())
        return 12 * model + (1 << 28)

    def damaged(self, folder: Path) -> Row:
        """Kill a run once a layer is finished, and damage that layer."""
        status = self.killed_with_a_layer(folder)
        flip(next((folder / ".out.work" / "layers").glob("layer-*.safetensors")))
        row = {"status": status, **self.again(folder)}
        return row | {"passed": row["identical"] and len(row["made_again"]) == 1}

    def killed_with_a_layer(self, folder: Path, model: Path | None = None) -> int:
        """Kill a run as soon as it has finished a layer; return how it ended."""
        process = self.start(folder, model)
        process.said("rewrite: ")
        layers = folder / ".out.work" / "layers"
        while not any(layers.glob("layer-*.json")) and process.runs:
            time.sleep(0.005)
        return process.kill()

    def changed(self, folder: Path) -> Row:
        """Kill a run, change a weight of the model, try to go on, and change it back."""
        model = folder / "model"
        shutil.copytree(self.model, model)
        status = self.killed_with_a_layer(folder, model)
        weights = sorted(model.glob("*.safetensors"))[-1]
        flip(weights)
        refused = self.start(folder, model)
        refused_status = refused.wait()
        flip(weights)
        row = {"status": status, "refused_status": refused_status, "message": message(refused)}
        row |= self.again(folder, model)
        is_refused = refused_status == 2 and "the model changed since" in refused.log
        return row | {"passed": is_refused and row["identical"]}

    def two(self, folder: Path) -> Row:
        """Start the command twice."""
        first = self.start(folder)
        first.said("calibrate: ")
        first.send(signal.SIGSTOP)  # or it might be done before the second one looks
        second = self.start(folder)
        refused_status = second.wait()
        first.send(signal.SIGCONT)
        status = first.wait()
        is_refused = refused_status == 2 and f"process {first.id}" in second.log
        is_same = status == 0 and checksums(folder / "out") == self.whole()["files"]
        return {
            "status": status,
            "refused_status": refused_status,
            "message": message(second),
            "identical": is_same,
            "passed": is_refused and is_same,
        }

    def stale(self, folder: Path) -> Row:
        """Kill a run and name a living process in its lock."""
        status = self.killed_with_a_layer(folder)
        lock = folder / ".out.work" / "lock"
        was_there = lock.is_file()
        lock.write_text(str(os.getpid()), encoding="utf-8")
        row = {"status": status, **self.again(folder)}
        return row | {"passed": was_there and row["identical"]}


def kill_point(lines: Sequence[tuple[float, str]], number: int, seed: int) -> tuple[str, int, float]:
    """Draw a moment of a run: a line of the log, the how manieth of its kind, and seconds after it.

    Args:
        lines: The log of an uninterrupted run, with the second of each line.
        number: Of the point; points take turns in the stages.
        seed: Of the moment inside the stage.
    """
    begins = [place for place, (_, line) in enumerate(lines) if memory_meter.STAGE.match(line)]
    stage = number % len(begins)
    first, last = begins[stage], (*begins[1:], len(lines) - 1)[stage]
    draw = random.Random(f"{seed} {number}")
    place = draw.randrange(first, max(last, first + 1))
    line = lines[place][1]
    until = lines[min(place + 1, len(lines) - 1)][0] - lines[place][0]
    return line, sum(text.startswith(line) for _, text in lines[: place + 1]), draw.uniform(0, until)


def checksums(bundle: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a bundle that does not tell times."""
    files = (path for path in sorted(bundle.rglob("*")) if path.is_file() and path.name not in DATED)
    return {str(path.relative_to(bundle)): sha256(path.read_bytes()).hexdigest() for path in files}


def message(process: Process) -> str:
    """Return the error that a process ended with, on one line, without folders of this machine."""
    lines = [line for _, line in process.lines if line]
    fix = next((place for place, line in enumerate(lines) if line.startswith("Fix: ")), None)
    text = " ".join(lines[max(0, fix - 1) : fix + 1]) if fix is not None else " ".join(lines[-1:])
    return without_folders(text)


def without_folders(text: str) -> str:
    """Return a line with absolute paths by their names."""
    return " ".join(Path(word).name if word.startswith("/") else word for word in text.split(" "))


def flip(path: Path) -> None:
    """Flip one bit in the last number of a file: the lowest of a byte that holds no sign or exponent of bfloat16."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-2, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def fill(path: Path) -> None:
    """Write a file that leaves next to nothing of its disk."""
    os.sync()
    free = shutil.disk_usage(path.parent).free
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free - LEFT_FREE))


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    return sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """Have a tmpfs of a size in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every story that is missing; write JSON and Markdown."""
    parser = harness.parser(__doc__, "rows")
    parser.add_argument("--model", type=Path, help="HF folder (default: one of a shape, made)")
    parser.add_argument("--shape", choices=shapes.SHAPES, default="135m", help="default %(default)s")
    parser.add_argument("--layers", type=int, default=2, help="of the shape (default %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--points", type=int, default=25, help="runs that are killed (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("out/crashes"), help="folder of models and outputs")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> int:
    """Measure and report; return 1 where a row did not pass."""
    model = args.model or args.work / f"{args.shape}-{args.layers}"
    if not model.exists():
        shapes.write(model, args.shape, layers=args.layers)
    title = args.model.name if args.model else f"{args.layers} layers of the shape {args.shape}"
    facts = {"model": title, "set": args.set, "threads": args.threads, "kill_seed": args.seed}
    results = Results(args.out, "crashes", facts)
    options = ["--device", "cpu", "--threads", str(args.threads)]
    options += [word for value in args.set for word in ("--set", value)]
    crashes = Crashes(
        model.resolve(),
        args.work.resolve(),
        options,
        lambda: results.rows[WHOLE],
        args.points,
        args.seed,
    )
    results.measure(crashes.rows(), [WHOLE, *args.rows])
    results.write_page(page(results))
    return int(not all(row["passed"] for row in results.rows.values()))


def page(results: Results) -> str:
    """Return the stories as a page."""
    facts, rows = results.facts, results.rows
    kills = {key: row for key, row in rows.items() if key.startswith("kill-")}
    others = {key: row for key, row in rows.items() if key not in kills and key != WHOLE}
    changed = f" with `{', '.join(facts['set'])}`" if facts["set"] else ""
    lines = [
        "# Crashes",
        "",
        "This page shows what happens to a compression that does not come to its end, and to the next run of the same "
        "command.",
        "",
        f"Made by `python samples/measure/crashes.py`. The model is {facts['model']}, in the default{changed}. Each "
        "row began with an empty cache. *Same bundle* means the same bytes as a run without an interruption, in every "
        f"file but {', '.join(f'`{name}`' for name in DATED)}, which tell times. *Went on from* is what the second run "
        "said that it found.",
        "",
        harness.reading(reading(kills, others)),
    ]
    if kills:
        head = ("", "stage", "after the line", "seconds after it", "went on from", "same bundle")
        found = [
            [
                *(key, row["stage"] or "start", f"`{row['line']}`", f"{row['delay']:.2f}"),
                *(row["went_on_from"] or "nothing", "yes" if row["identical"] else "**no**"),
            ]
            for key, row in kills.items()
        ]
        lines += ["", "## kill -9", "", harness.table(head, found, "   r")]
    if others:
        head = ("", "ended with", "said", "went on from", "same bundle", "passed")
        found = [
            [
                key,
                row.get("refused_status", row["status"]),
                row.get("message") or "; ".join(row.get("made_again", [])) or "–",
                row.get("went_on_from") or "–",
                "yes" if row["identical"] else "**no**",
                "yes" if row["passed"] else "**no**",
            ]
            for key, row in others.items()
        ]
        lines += ["", "## Other ends", "", harness.table(head, found)]
    return "\n".join([*lines, ""])


def reading(kills: Rows, others: Rows) -> Iterator[str]:
    """Yield what the rows show."""
    if kills:
        same = sum(row["identical"] for row in kills.values())
        stages = dict.fromkeys(row["stage"] or "start" for row in kills.values())
        yield (
            f"{len(kills)} runs were killed, in {len(stages)} stages: {', '.join(stages)}. The same command then made "
            f"the same bundle in {same} of {len(kills)} cases."
        )
        went_on = sum(bool(row["went_on_from"]) for row in kills.values())
        yield f"{went_on} of these runs found work of the killed run beside the output and went on with it."
    full = {key: row for key, row in others.items() if key.startswith("full-")}
    if full:
        clear = sum(row["status"] == 2 for row in full.values())
        yield (
            f"The disk was full in {len(full)} stages. The run ended with status 2 in {clear} of them, and with space "
            f"the same command made the same bundle in {sum(row['identical'] for row in full.values())}."
        )
    if failed := [key for key, row in {**kills, **others}.items() if not row["passed"]]:
        yield f"Not as it should be: {', '.join(failed)}."


if __name__ == "__main__":
    sys.exit(main())

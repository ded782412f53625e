"""How much memory and disk a command takes in each of its stages. It needs Linux.

    python samples/measure/memory_meter.py --folders OUT -- rk-export compress MODEL -o OUT

The command runs with all its children. Every 50 ms the meter reads their `/proc/PID/status`: RssAnon is what the
processes hold, RssFile are mapped pages that the system may drop at any time. Pages that a child shares with its parent
count twice. Disk is what the named folders take, with the half-written ones beside them, every 250 ms; and files that
the processes map from there and that have no name any more.

A stage begins with a line in the log of one word, such as `calibrate: metric self`; a step inside it with a line that
counts, such as `rewriting layers: 30`, and lasts until the next such line. So the command must not be `--quiet`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness

STAGE = re.compile(r"([a-z][a-z-]*): \D")
STEP = re.compile(r"([a-z][^:]*): \d+(?:, \d+ of them done before)?$")
BEFORE = "start"  # what runs before the first line
SECONDS = 0.05
_SLOW = 5  # samples between two looks at the folders and at the table of processes
_KINDS = ("RssAnon", "RssFile", "RssShmem")


@dataclass
class Usage:
    """What a stage or one of its steps took.

    Args:
        stage: Its name.
        step: The step inside the stage; empty for the whole stage.
        seconds: How long it ran; times of the same name add up.
        anon: Peak of RssAnon, in bytes, summed over the processes.
        file: Peak of RssFile, in the same way.
        shared: Peak of RssShmem, in the same way.
        disk: Peak of the folders, in bytes.
    """

    stage: str
    step: str = ""
    seconds: float = 0.0
    anon: int = 0
    file: int = 0
    shared: int = 0
    disk: int = 0

    def add(self, other: Usage) -> None:
        """Add the time of a moment and raise the peaks to what it took."""
        self.seconds += other.seconds
        for name in ("anon", "file", "shared", "disk"):
            setattr(self, name, max(getattr(self, name), getattr(other, name)))


@dataclass
class Metered:
    """What a command took.

    Args:
        status: Its exit status; negative for a signal.
        lines: Its log, with the second at which each line came.
        usages: Stages and their steps in the order in which they began.
    """

    status: int = 0
    lines: list[tuple[float, str]] = field(default_factory=list)
    usages: dict[tuple[str, str], Usage] = field(default_factory=dict)

    @property
    def stages(self) -> list[Usage]:
        """Whole stages alone."""
        return [usage for usage in self.usages.values() if not usage.step]

    @property
    def whole(self) -> Usage:
        """The sum of the times of all stages, and the peak over them."""
        total = Usage("whole")
        for usage in self.stages:
            total.add(usage)
        return total

    def row(self) -> harness.Row:
        """Return everything but the log, JSON-ready."""
        return {
            "status": self.status,
            "whole": asdict(self.whole),
            "usages": [asdict(usage) for usage in self.usages.values()],
        }

    def table(self, *, steps: bool = False) -> str:
        """Return a Markdown table of the stages, of their steps if asked for, and of the whole; MB are 10^6 bytes."""
        # Steps stand below their stage, which may have gone on after other stages.
        ordered = [usage for one in self.stages for usage in self.usages.values() if usage.stage == one.stage]
        shown = [usage for usage in ordered if steps or not usage.step]
        head = ("stage", "seconds", "peak RssAnon, MB", "peak RssFile, MB", "disk, MB")
        return harness.table(head, map(_cells, [*shown, self.whole]), "-rrrr")


def _cells(usage: Usage) -> list[str]:
    name = f"· {usage.step}" if usage.step else usage.stage
    sizes = (f"{value / 1e6:,.0f}" for value in (usage.anon, usage.file, usage.disk))
    return [name, f"{usage.seconds:.1f}", *sizes]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and print the table after it; return the command's own exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folders", type=Path, nargs="+", default=[], help="whose disk usage is watched")
    parser.add_argument("--steps", action="store_true", help="a row for each step inside a stage, too")
    parser.add_argument("--save", type=Path, metavar="FILE", help="keep the figures as JSON")
    parser.add_argument("command", nargs="+", help="after --: what is run")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> int:
    """Run and print."""
    found = metered(args.command, args.folders)
    print(found.table(steps=args.steps))
    if args.save is not None:
        args.save.write_text(f"{json.dumps(found.row(), indent=1)}\n", encoding="utf-8")
    return found.status


def metered(
    command: Sequence[str | os.PathLike[str]],
    folders: Iterable[Path] = (),
    *,
    env: Mapping[str, str] | None = None,
    echo: bool = True,
) -> Metered:
    """Run a command and return what each of its stages took.

    Args:
        command: The words.
        folders: Whose disk usage is watched; they need not exist yet.
        env: The environment; None takes ours.
        echo: Pass the log on to our own standard error.
    """
    found, places = Metered(), [folder.absolute() for folder in folders]
    begin = time.monotonic()
    with subprocess.Popen(list(command), stderr=subprocess.PIPE, text=True, errors="replace", env=env) as ran:
        assert ran.stderr is not None
        reader = threading.Thread(target=_read, args=(ran.stderr, found.lines, begin, echo), daemon=True)
        reader.start()
        _watch(ran, found, places, begin)
        reader.join()
        found.status = ran.wait()
    return found


def _read(log: IO[str], lines: list[tuple[float, str]], begin: float, echo: bool) -> None:
    for line in log:
        lines.append((time.monotonic() - begin, line.rstrip("\n")))
        if echo:
            sys.stderr.write(line)


def _watch(ran: subprocess.Popen[str], found: Metered, folders: Sequence[Path], begin: float) -> None:
    """Sample until the process ends; each sample belongs to the stage and the step that the log named last."""
    stage, step, read, last, turn = BEFORE, "", 0, 0.0, 0
    tree, disk = [ran.pid], 0
    while ran.poll() is None:
        if turn % _SLOW == 0:
            tree = descendants(ran.pid)
            disk = sum(map(disk_bytes, folders)) + unnamed_bytes(tree, folders)
        turn += 1
        anon, file, shared = resident(tree)
        now = time.monotonic() - begin
        # A line that came meanwhile begins the next sample: what was held until now belongs to the old stage.
        for key in dict.fromkeys(((stage, ""), (stage, step))):
            seconds = now - last
            found.usages.setdefault(key, Usage(*key)).add(Usage(*key, seconds, anon, file, shared, disk))
        last = now
        for _, line in found.lines[read:]:
            read += 1
            if match := STEP.match(line):
                step = match[1]
            elif match := STAGE.match(line):
                stage, step = match[1], ""
        time.sleep(SECONDS)


def resident(processes: Iterable[int]) -> tuple[int, int, int]:
    """Return RssAnon, RssFile and RssShmem of processes together, in bytes; one that has ended counts nothing."""
    sums = dict.fromkeys(_KINDS, 0)
    for process in processes:
        try:
            status = Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in sums:
                sums[name] += 1024 * int(value.split()[0])
    return sums["RssAnon"], sums["RssFile"], sums["RssShmem"]


def descendants(process: int) -> list[int]:
    """Return a process, its children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "stat").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # it has ended
        parent = int(status.rpartition(")")[2].split()[1])  # the name in brackets may hold anything
        children.setdefault(parent, []).append(int(entry.name))
    found = [process]
    for one in found:  # grows while it is read
        found += children.get(one, [])
    return found


def disk_bytes(folder: Path) -> int:
    """Return the bytes that a folder takes on the disk, with hidden work beside it such as `.NAME.partial-...`."""
    total = 0
    for place in (folder, *folder.parent.glob(f".{folder.name}.*")):
        if place.is_file():
            total += _blocks(place)
        for root, _, files in os.walk(place):
            total += sum(_blocks(Path(root, name)) for name in files)
    return total


def unnamed_bytes(processes: Iterable[int], folders: Iterable[Path]) -> int:
    """Return the bytes of deleted files that processes map, of those that lay in folders or in work beside them."""
    places = [start for one in folders for start in (f"{one}/", f"{one.parent}/.{one.name}.")]
    lengths: dict[str, int] = {}
    for process in processes:
        try:
            lines = Path(f"/proc/{process}/maps").read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            if not line.endswith(" (deleted)"):
                continue
            span, _, offset, _, inode, path = line.split(maxsplit=5)
            if path.startswith(tuple(places)):
                begin, end = (int(bound, 16) for bound in span.split("-"))
                reaches = int(offset, 16) + end - begin  # a file may be mapped in pieces
                lengths[inode] = max(lengths.get(inode, 0), reaches)
    return sum(lengths.values())


def _blocks(file: Path) -> int:
    try:
        return 512 * file.lstat().st_blocks
    except OSError:  # moved or deleted meanwhile
        return 0


if __name__ == "__main__":
    sys.exit(main())

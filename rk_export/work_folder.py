"""What a run keeps beside its output until it is complete, so that the same command goes on after an interruption."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from filelock import FileLock, Timeout

from rk_export.atomic import atomic_file
from rk_export.errors import InputError
from rk_export.folders import is_full, no_space
from rk_export.json_codec import load_json

logger = logging.getLogger(__name__)

_IDENTITY, _PLAN, _LAYERS = "run.json", "plan.json", "layers"
_LOCK, _HOLDER = "lock", "holder"


def work_folder_of(out: Path) -> Path:
    """Return where the unfinished run of an output lies."""
    return out.with_name(f".{out.name}.work")


def state_file(out: Path, name: str) -> Path:
    """Return where an interrupted training waits for the next run."""
    return work_folder_of(out) / f"{name}.state"


def finished_layers(out: Path) -> int:
    """Return how many layers the unfinished run of an output has finished."""
    return len(list((work_folder_of(out) / _LAYERS).glob("layer-*.json")))


class WorkFolder:
    """Context manager for the work folder of an output; one process at a time has it.

    It goes away when the run succeeds. Otherwise what is worth going on from stays.

    Args:
        out: The output.
        resume: Go on with what an earlier run left; without it that is deleted.

    Raises:
        InputError: On entry, if another process works there; later, if a disk is full.
    """

    def __init__(self, out: Path, *, resume: bool = True) -> None:
        self.out, self.path, self._resume = out, work_folder_of(out), resume
        self._lock = FileLock(self.path / _LOCK, timeout=0)
        self._is_ours = False

    @property
    def plan(self) -> Path:
        """Where the plan of the run lies once it is decided."""
        return self.path / _PLAN

    @property
    def layers(self) -> Path:
        """Where finished layers lie."""
        return self.path / _LAYERS

    def state(self, name: str) -> Path:
        """Return where a training keeps its progress."""
        return state_file(self.out, name)

    def __enter__(self) -> WorkFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        holder = self.path / _HOLDER
        try:
            # The system takes the lock away when the process ends, however it ends.
            self._lock.acquire()
        except Timeout as error:
            number = holder.read_text(encoding="utf-8") if holder.is_file() else "unknown"
            raise InputError(
                f"another run works on this output (process {number})",
                where=str(self.path),
                fix="wait until it ends, or give another output folder",
            ) from error
        if not self._resume:
            self._clear()
        try:
            holder.write_text(str(os.getpid()), encoding="utf-8")
        except OSError as error:
            if is_full(error):
                raise no_space(self.path) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept = any(path.name not in (_LOCK, _HOLDER, _IDENTITY) for path in self.path.iterdir())
        if self._is_ours and (error is None or not kept):
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()
        if error is not None and is_full(error):
            named = error.filename if isinstance(error, OSError) else None
            raise no_space(Path(named or self.path)) from error

    def begin(self, identity: Mapping[str, str]) -> None:
        """Take note of what decides the result, or refuse to go on with a run in which it differed.

        Args:
            identity: What decides the result, by a name that messages use: ``the model``, ``the recipe`` ...

        Raises:
            InputError: Names what differs.
        """
        path = self.path / _IDENTITY
        if path.is_file():
            before = self._read(path)
            if differing := [name for name, value in identity.items() if before.get(name) != value]:
                raise InputError(
                    f"an unfinished run of this output lies here, and {' and '.join(differing)} changed since",
                    where=str(self.path),
                    fix="add --no-resume to begin anew, or give another output folder",
                )
            done = [*(["the plan"] if self.plan.is_file() else []), f"{finished_layers(self.out)} layers"]
            done += [f"the state of {path.stem}" for path in self.path.glob("*.state")]
            logger.info("going on with an unfinished run: %s", ", ".join(done))
            self._is_ours = True
            return
        self._clear()
        self._is_ours = True
        with atomic_file(path) as partial:
            partial.write_text(json.dumps(dict(identity), indent=1), encoding="utf-8")

    def _read(self, path: Path) -> dict[str, str]:
        found = load_json(path, fix="add --no-resume to begin anew")
        return found if isinstance(found, dict) else {}

    def _clear(self) -> None:
        """Delete all but the lock."""
        for path in self.path.iterdir():
            if path.name in (_LOCK, _HOLDER):
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()

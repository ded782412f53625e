"""The state of a training on disk: written atomically, and only ever continued by the run it belongs to."""

from __future__ import annotations

import hashlib
import pickle
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rk_export.atomic import atomic_file
from rk_export.errors import InputError

STATE_VERSION = 1
_SECONDS_BETWEEN = 60.0
_LARGEST_SHARE = 0.05  # of the time that writing may take
_SAMPLE = 256  # values of each tensor that the fingerprint reads


@dataclass(frozen=True)
class TrainingState:
    """Where a training stands between two steps.

    Args:
        fingerprint: Of the run, from `fingerprint` or `run_fingerprint`.
        step: Steps done.
        losses: (step, loss) so far.
        seconds: Time spent so far.
        tensors: The trained tensors by name, and whatever else the next step depends on.
        optimizer: The optimizer's state dict.
    """

    fingerprint: str
    step: int
    losses: tuple[tuple[int, float], ...]
    seconds: float
    tensors: dict[str, Tensor]
    optimizer: dict[str, Any]


def run_fingerprint(model: nn.Module, tokens: Tensor, choices: object) -> str:
    """Return a fingerprint of a training: first values of every tensor before it, tokens, and choices by their repr."""
    digest = hashlib.sha256(repr(choices).encode())
    digest.update(repr(tuple(tokens.shape)).encode() + tokens.cpu().numpy().tobytes())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().flatten()[:_SAMPLE].cpu().numpy().tobytes())
    return digest.hexdigest()


class StateFile:
    """A state on disk, written at most every minute and at most a twentieth of the time.

    Args:
        path: The file; None writes nothing.
        run: The run's fingerprint.
        training: What is trained, for messages.
    """

    def __init__(self, path: Path | None, run: str, training: str = "recovery") -> None:
        self._path, self.run, self._training = path, run, training
        self._due = time.monotonic() + _SECONDS_BETWEEN

    def read(self) -> TrainingState | None:
        """Return the state that an earlier run left, or None.

        Raises:
            InputError: If the file is not readable as a state, or belongs to another run.
        """
        if self._path is None or not self._path.exists():
            return None
        try:
            data = torch.load(self._path, weights_only=True, map_location="cpu", mmap=True)
            state = TrainingState(**data["state"]) if data["version"] == STATE_VERSION else None
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError) as error:
            raise InputError(
                f"is no state of a {self._training} ({type(error).__name__})",
                where=str(self._path),
                fix=f"delete it; the {self._training} starts from the beginning",
            ) from error
        if state is None or state.fingerprint != self.run:
            raise InputError(
                f"is the state of another {self._training}: the model, the plan, the tokens or the options differ",
                where=str(self._path),
                fix="run it with what it was started with, or delete the file",
            )
        return state

    @property
    def is_due(self) -> bool:
        """Whether it is time to write."""
        return self._path is not None and time.monotonic() >= self._due

    def write(self, state: TrainingState) -> None:
        """Replace the file in one move.

        Raises:
            InputError: If the disk is full or the folder cannot be written to.
        """
        if self._path is None:
            return
        begin = time.monotonic()
        try:
            with atomic_file(self._path) as partial:
                torch.save({"version": STATE_VERSION, "state": _shallow(state)}, partial)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            raise InputError(
                f"the state of the {self._training} cannot be written: {error}",
                where=str(self._path),
                fix="free some space, or name another file",
            ) from error
        now = time.monotonic()
        self._due = now + max(_SECONDS_BETWEEN, (now - begin) / _LARGEST_SHARE)


def _shallow(state: TrainingState) -> dict[str, Any]:
    return {item.name: getattr(state, item.name) for item in fields(state)}

"""The machine that a command runs on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rk_export.errors import FieldError


@dataclass(frozen=True)
class Run:
    """Where and how a command works. It changes no result, so no plan and no bundle holds any of it.

    Args:
        device: Where the model runs, and matrices are factorized and quantized: auto, cpu, cuda or cuda:N.
        threads: Threads of ONNX Runtime; None lets it decide.
        texts: Files in which the texts of a plan are looked for, by content.
    """

    device: str = "auto"
    threads: int | None = None
    texts: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise FieldError(f"{self.threads} is out of range", where="threads", fix="give at least 1")

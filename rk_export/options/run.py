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
        workers: Processes that finish layers side by side.
        ray: Address of a Ray cluster whose nodes finish them instead; None uses this machine alone.
    """

    device: str = "auto"
    threads: int | None = None
    texts: tuple[Path, ...] = ()
    workers: int = 1
    ray: str | None = None

    def __post_init__(self) -> None:
        for name, count in (("threads", self.threads), ("workers", self.workers)):
            if count is not None and count < 1:
                raise FieldError(f"{count} is out of range", where=name, fix="give at least 1")
        if self.ray is not None and self.workers > 1:
            raise FieldError("the cluster has workers of its own", where="workers", fix="drop it, or --ray")

"""What a stage of a run takes: memory, disk and work, each as a sum of named terms."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

# What takes time. FLOPs count a multiplication and an addition each.
WorkKind = Literal[
    "products",  # FLOPs of matrix products of many rows, in the type that the device multiplies in
    "float_products",  # FLOPs of such products in float32
    "thin_products",  # FLOPs of products of few rows, as when text is written, in the type of the device
    "int4_products",  # FLOPs of INT4 products of few rows in ONNX Runtime
    "grams",  # FLOPs of second moments: n (n + 1) for each token
    "factors",  # FLOPs of Cholesky factors: n³ / 3
    "sweeps",  # entries that GPTQ rounds, each twice; its products are counted as float_products
    "passes",  # bytes that elementwise steps read or write in memory
    "calls",  # short operations, whose time is that of calling them
    "writes",  # bytes written to the disk
    "reads",  # bytes read from it
    "checksums",  # bytes that SHA-256 reads
]
KINDS: tuple[WorkKind, ...] = get_args(WorkKind)
Work = Mapping[WorkKind, float]
_ARITHMETIC = frozenset(KINDS) - {"calls", "writes", "reads", "checksums"}
# What a stage reaches of the rates of single kernels, at which it runs between other steps: on a 0.5 B model the stages
# took 1.3 to 2.4 times as long as the rates alone say.
_SHARE = 0.5

# Folders that may lie on different file systems.
Place = Literal["output", "cache"]


@dataclass(frozen=True)
class Term:
    """One part of what is needed.

    Args:
        name: What it is.
        bytes: How large.
        place: Where, of a part on disk; the work folder lies beside the output.
    """

    name: str
    bytes: int
    place: Place | None = None


@dataclass(frozen=True)
class StageNeeds:
    """What one stage takes.

    Args:
        name: As the log names it.
        memory: Parts of the anonymous memory at its peak; mapped files are none.
        gpu: Parts of the device's memory at its peak; empty without one.
        disk: Parts of what lies on disk at its peak, what earlier stages left included.
        work: What takes its time.
    """

    name: str
    memory: tuple[Term, ...] = ()
    gpu: tuple[Term, ...] = ()
    disk: tuple[Term, ...] = ()
    work: Work = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """Anonymous memory at the peak."""
        return total(self.memory)

    @property
    def gpu_bytes(self) -> int:
        """Memory of the device at the peak."""
        return total(self.gpu)

    @property
    def disk_bytes(self) -> int:
        """Bytes on all disks at the peak."""
        return total(self.disk)

    def on(self, place: Place) -> int:
        """Return the bytes in one place at the peak."""
        return total(term for term in self.disk if term.place == place)

    def seconds(self, rates: Work) -> float:
        """Return its time on a machine.

        Args:
            rates: What the machine does in a second, by kind.
        """
        return sum(
            amount / (rates[kind] * (_SHARE if kind in _ARITHMETIC else 1))
            for kind, amount in self.work.items()
        )


def total(terms: Iterable[Term]) -> int:
    """Return the bytes of terms together."""
    return sum(term.bytes for term in terms)


def added(*works: Work) -> Work:
    """Return several works as one."""
    sums: defaultdict[WorkKind, float] = defaultdict(float)
    for work in works:
        for kind, amount in work.items():
            sums[kind] += amount
    return dict(sums)


def times(count: float, work: Work) -> Work:
    """Return a work that is done several times."""
    return {kind: count * amount for kind, amount in work.items()}


def needed_in(stages: Iterable[StageNeeds], place: Place) -> int:
    """Return the largest number of bytes that any stage has in a place."""
    return max((stage.on(place) for stage in stages), default=0)

"""Several models side by side: what is known of each one, and what they were measured to be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rk_export.json_codec import Float, to_json
from rk_export.report.records import LayerError, ParityTier, SizeSummary


@dataclass(frozen=True)
class Score:
    """One measure of one model.

    Args:
        on: The text or task.
        measure: ``perplexity``, ``acc`` or ``acc_norm``.
        value: The value.
        error: Its standard error; None where it is not known.
        difference: The value less that of the first model on the same windows or items, or None.
        difference_error: Standard error of the difference.
    """

    on: str
    measure: str
    value: Float
    error: Float | None = None
    difference: Float | None = None
    difference_error: Float | None = None


@dataclass(frozen=True)
class MatrixChoice:
    """What became of one matrix.

    Args:
        role: What the matrix is in its layer, e.g. ``q``.
        form: ``dense``, ``joint``, ``per_head``, ``identity`` or ``sparse``.
        shared_with: The other matrices of its group.
        rank: Inner size of the factors; 0 where there are none.
        entries: Entries of the sparse part.
        bits: Bits of a weight, or None for floats.
        block: Weights that share a scale, or None for floats.
        activations: Bits of the inputs, or None for floats.
        errors: Relative weight errors of its group, in the order of the passes.
    """

    role: str
    form: str
    shared_with: tuple[str, ...] = ()
    rank: int = 0
    entries: int = 0
    bits: int | None = None
    block: int | None = None
    activations: int | None = None
    errors: tuple[Float, ...] = ()

    @property
    def choice(self) -> str:
        """The choice in words: ``joint with k, rank 24, INT4 in blocks of 32``."""
        parts = [self.form.replace("_", " ")]
        if self.shared_with:
            parts[0] += f" with {', '.join(self.shared_with)}"
        if self.rank:
            parts.append(f"rank {self.rank}")
        if self.entries:
            parts.append(f"{self.entries:,} entries")
        if self.bits is None:
            parts.append("floats")
        else:
            inputs = "" if self.activations in (None, 16) else f", INT{self.activations} inputs"
            parts.append(f"INT{self.bits} in blocks of {self.block}{inputs}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Compared:
    """One of the models.

    Args:
        name: What tells it from the others.
        kind: ``bundle``, ``checkpoint`` or ``model``.
        made_from: The dense model that a bundle was made from.
        file_bytes: Bytes of its model files.
        size: Parameters and bytes, from the report.
        scores: What was measured.
        speed: Tokens per second by phase.
        parity: Tiers of the report.
        layer_errors: Of the report.
        layer_bytes: Stored bytes of each layer.
        matrices: What became of each matrix, by its name.
    """

    name: str
    kind: str
    made_from: str = ""
    file_bytes: int | None = None
    size: SizeSummary | None = None
    scores: tuple[Score, ...] = ()
    speed: dict[str, Float] = field(default_factory=dict)
    parity: tuple[ParityTier, ...] = ()
    layer_errors: tuple[LayerError, ...] = ()
    layer_bytes: dict[str, int] = field(default_factory=dict)
    matrices: dict[str, MatrixChoice] = field(default_factory=dict)

    def score(self, on: str, measure: str) -> Score | None:
        """Return one of the scores."""
        return next((one for one in self.scores if (one.on, one.measure) == (on, measure)), None)


@dataclass(frozen=True)
class Comparison:
    """Models side by side, differences to the first one.

    Args:
        models: The models.
        command: Command line that repeats it.
    """

    models: tuple[Compared, ...]
    command: str = ""

    @property
    def measures(self) -> list[tuple[str, str]]:
        """Text or task and measure of every score, in the order in which they first appear."""
        return list(dict.fromkeys((one.on, one.measure) for model in self.models for one in model.scores))

    @property
    def differing(self) -> dict[str, tuple[MatrixChoice | None, ...]]:
        """The matrices for which not all models chose alike, with every model's choice."""
        models = [model for model in self.models if model.matrices]
        names = dict.fromkeys(name for model in models for name in model.matrices)
        chosen = {name: tuple(model.matrices.get(name) for model in models) for name in names}
        return {
            name: choices
            for name, choices in chosen.items()
            if len({None if one is None else one.choice for one in choices}) > 1
        }

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary."""
        data: dict[str, Any] = to_json(self)
        return data

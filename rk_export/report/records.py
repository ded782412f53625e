"""The report of a run: what was done to each matrix, at what cost, and how that was verified.

Every class here is a frozen dataclass with an exact JSON round trip; only :class:`Report` carries a version.
``rk_export.report.render`` turns a report into text, Markdown and HTML.
"""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.json_codec import Float, from_json, load_json, to_json

FORMAT = "rk-export report"
VERSION = 1
TIERS = "0pabcdefghis"


class Outcome(enum.StrEnum):
    """What became of a target."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    REFUSED = "refused"


@dataclass(frozen=True)
class Finding:
    """One pass at one target.

    Args:
        target: Module path or node pattern, e.g. ``layers.3.self_attn.qk``.
        outcome: Applied, skipped or refused.
        reason: Why; must be set unless applied.
        bytes_before: Stored bytes of the target's weights before the pass.
        bytes_after: Stored bytes afterwards, scales and zero points included.
        error: Relative Frobenius error that the pass introduced, or None where none is defined.
        details: What the pass chose (rank, bits, kept share ...), JSON-ready. The keys ``rank`` (one number,
            or a list of one per head), ``entries``, ``pairs``, ``bits``, ``activations`` and ``block`` are columns of
            the tables.
    """

    target: str
    outcome: Outcome
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    error: Float | None = None
    details: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.outcome is not Outcome.APPLIED and not self.reason:
            raise ValueError(f"{self.target}: a {self.outcome.value} finding needs a reason")


@dataclass(frozen=True)
class Fusion:
    """How often a fused pattern was planned and how often it is in the exported graph.

    Args:
        pattern: Its name, e.g. ``shared down-projection`` or ``MatMulNBits``.
        planned: Occurrences that the plan asks for.
        found: Occurrences counted in the graph.
        reason: Why the two differ, or why none was planned.
    """

    pattern: str
    planned: int
    found: int
    reason: str = ""


@dataclass(frozen=True)
class ParityTier:
    """One comparison of two ways to compute the same logits.

    Args:
        tier: One of `TIERS`.
        name: What is compared, e.g. ``PyTorch quantized vs ONNX Runtime``.
        max_error: Largest absolute difference of a logit, or None where the tier was not measured; the note says why.
        scale: Largest absolute logit of the reference, which makes ``max_error`` relative; None like ``max_error``.
        bound: Largest ``max_error / scale`` that passes, or None where the error is the method's and no bug.
        kl: Mean Kullback-Leibler divergence of the next-token distributions, in nats.
        top1_agreement: Share of positions with the same most likely token, 0 to 1.
        passed: The verdict, or None where there is no bound.
        note: Anything the reader must know, e.g. how many prompts and tokens.
    """

    tier: str
    name: str
    max_error: Float | None
    scale: Float | None
    bound: Float | None = None
    kl: Float | None = None
    top1_agreement: Float | None = None
    passed: bool | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.tier not in tuple(TIERS):
            raise ValueError(f"parity tier {self.tier!r} is none of {', '.join(TIERS)}")

    @property
    def relative_error(self) -> float | None:
        """``max_error / scale``, or None where the scale is zero or nothing was measured."""
        return self.max_error / self.scale if self.scale and self.max_error is not None else None


@dataclass(frozen=True)
class LayerError:
    """Relative Frobenius error of one decoder layer's output against the dense model's.

    Args:
        layer: Index of the layer, from 0.
        factorized: Error with factorized, unquantized weights.
        quantized: Error with factorized and quantized weights.
    """

    layer: int
    factorized: Float
    quantized: Float


@dataclass(frozen=True)
class Spectrum:
    """Singular values of one matrix group, stacked as the joint factorization stacks it.

    Args:
        target: The group, e.g. ``layers.3.self_attn.qk``.
        singular_values: All of them, in descending order.
        chosen_rank: Rank of the plan, or None where the group stays dense or nothing was planned.
        full_rank: Smaller side of the stacked matrix.
        effective_rank: Exponential of the entropy of the normalized singular values.
        stable_rank: Squared Frobenius norm over squared spectral norm.
        energy_rank_90: Smallest rank that keeps 90 % of the squared singular values; 95 and 99 alike.
        gavish_donoho_rank: Number of singular values above the optimal hard threshold for unknown noise.
    """

    target: str
    singular_values: list[Float]
    chosen_rank: int | None
    full_rank: int
    effective_rank: Float
    stable_rank: Float
    energy_rank_90: int
    energy_rank_95: int
    energy_rank_99: int
    gavish_donoho_rank: int


@dataclass(frozen=True)
class SizeSummary:
    """Parameters and bytes of the whole model.

    Args:
        dense_parameters: Parameters of the dense model, tied weights once.
        kept_parameters: Parameters stored after compression, factors counted in full.
        dense_bytes: Bytes of the dense weights as the source stores them.
        compressed_bytes: Bytes of the compressed weights; scales, zero points and indices included.
        file_bytes: Bytes of the exported model files, or None where nothing was exported.
    """

    dense_parameters: int
    kept_parameters: int
    dense_bytes: int
    compressed_bytes: int
    file_bytes: int | None = None


@dataclass(frozen=True)
class Report:
    """Everything a run has to tell; fields of stages that did not run stay empty.

    Args:
        model: Name or folder of the source model.
        model_type: Its architecture, e.g. ``llama``.
        created: When, ISO 8601.
        command: Command line that repeats the run.
        versions: Package or device name to version.
        timings: Seconds by stage, in the order they ran.
        warnings: What went badly although the run ended: it is shown before everything else.
        notices: What the reader must know. One that begins with the name of a section and a colon
            (``spectra: not computed, the model came from a checkpoint``) says why that section is empty.
    """

    model: str
    model_type: str
    created: str
    command: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    parity: tuple[ParityTier, ...] = ()
    layer_errors: tuple[LayerError, ...] = ()
    spectra: tuple[Spectrum, ...] = ()
    size: SizeSummary | None = None
    timings: dict[str, Float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that names its format and version."""
        return {"format": FORMAT, "version": VERSION, **to_json(self)}

    @classmethod
    def from_json(cls, data: Any, where: str = "report") -> Report:
        """Return the report that ``to_json`` wrote.

        Raises:
            InputError: Another format or version, or a field that does not fit.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise InputError("not a report of rk-export", where=where, fix="pass a bundle's report.json")
        if (version := data.get("version")) != VERSION:
            fix = "read it with the rk-export that wrote it, or write it again with this one"
            what = f"report version {version!r} is not supported; this rk-export reads version {VERSION}"
            raise InputError(what, where=where, fix=fix)
        stored = {key: value for key, value in data.items() if key not in ("format", "version")}
        return from_json(cls, stored, where, fix="restore the file, or run the command again")

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, one list element per line so that two reports can be compared by line."""
        lines = (f" {json.dumps(key)}: {_json_lines(value)}" for key, value in self.to_json().items())
        Path(path).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a report that ``save`` wrote.

        Raises:
            InputError: No such file, not JSON, another version, or a field that does not fit.
        """
        data = load_json(Path(path), fix="pass a bundle, or restore the file")
        return cls.from_json(data, str(path))


def _json_lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    items = (json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value)
    return "[\n  " + ",\n  ".join(items) + "\n ]"

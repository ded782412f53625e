"""The report of a run: what was done to each matrix, at what cost, and how that was verified.

Every class here is a frozen dataclass with an exact JSON round trip; only :class:`Report` carries a version.
``rk_export.report.render`` turns a report into text, Markdown and HTML.
"""

from __future__ import annotations

import enum
import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from rk_export.errors import InputError

FORMAT = "rk-export report"
VERSION = 1
TIERS = "0pabcdefgh"

RecordT = TypeVar("RecordT", bound="Record")


@dataclass(frozen=True)
class Record:
    """Base of the report's dataclasses: JSON both ways, with the types checked on the way in.

    Floats that JSON cannot hold (infinities, NaN) are written as strings: ``"inf"``, ``"-inf"``, ``"nan"``.
    """

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary, field by field."""
        return {item.name: _encode(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls: type[RecordT], data: Any, where: str = "") -> RecordT:
        """Return the record that ``to_json`` wrote.

        Args:
            data: The dictionary.
            where: Path of the record inside its document, for messages.

        Raises:
            InputError: A field is missing, unknown or of the wrong type, or its value is refused.
        """
        where = where or cls.__name__
        if not isinstance(data, Mapping):
            raise InputError(f"expected an object, found {type(data).__name__}", where=where)
        hints = get_type_hints(cls)
        if unknown := sorted(set(data) - set(hints)):
            raise InputError(f"unknown field {unknown[0]!r}", where=where)
        if missing := sorted(_required(cls) - set(data)):
            raise InputError(f"the field {missing[0]!r} is missing", where=where)
        values = {key: _decode(hints[key], value, f"{where}.{key}") for key, value in data.items()}
        try:
            return cls(**values)
        except ValueError as error:
            raise InputError(str(error), where=where) from error


def _required(record: type[Record]) -> set[str]:
    return {
        item.name for item in fields(record) if item.default is MISSING and item.default_factory is MISSING
    }


def _encode(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _decode(hint: Any, value: Any, where: str) -> Any:
    """Return ``value`` as the annotated type ``hint``, or raise InputError that names ``where``."""
    if hint is Any:
        return value
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return None if value is None else _decode(arguments[0], value, where)
    if origin in (list, tuple) and isinstance(value, list):
        return origin(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if origin is None and issubclass(hint, Record):
        return hint.from_json(value, where)
    return _decode_scalar(hint, value, where)


def _decode_scalar(hint: Any, value: Any, where: str) -> Any:
    try:
        if hint is float and not isinstance(value, bool):
            return float(value)
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            return hint(value)
        if hint in (int, str, bool) and type(value) is hint:
            return value
    except (TypeError, ValueError):
        pass  # reported below, with the place
    expected = getattr(get_origin(hint) or hint, "__name__", str(hint))
    raise InputError(f"expected {expected}, found {value!r}", where=where)


class Outcome(enum.StrEnum):
    """What became of a target."""

    APPLIED = "applied"
    SKIPPED = "skipped"
    REFUSED = "refused"


@dataclass(frozen=True)
class Finding(Record):
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
    error: float | None = None
    details: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.outcome is not Outcome.APPLIED and not self.reason:
            raise ValueError(f"{self.target}: a {self.outcome.value} finding needs a reason")


@dataclass(frozen=True)
class Fusion(Record):
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
class ParityTier(Record):
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
    max_error: float | None
    scale: float | None
    bound: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
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
class LayerError(Record):
    """Relative Frobenius error of one decoder layer's output against the dense model's.

    Args:
        layer: Index of the layer, from 0.
        factorized: Error with factorized, unquantized weights.
        quantized: Error with factorized and quantized weights.
    """

    layer: int
    factorized: float
    quantized: float


@dataclass(frozen=True)
class Spectrum(Record):
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
    singular_values: list[float]
    chosen_rank: int | None
    full_rank: int
    effective_rank: float
    stable_rank: float
    energy_rank_90: int
    energy_rank_95: int
    energy_rank_99: int
    gavish_donoho_rank: int


@dataclass(frozen=True)
class SizeSummary(Record):
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
class Report(Record):
    """Everything a run has to tell; fields of stages that did not run stay empty.

    Args:
        model: Name or folder of the source model.
        model_type: Its architecture, e.g. ``llama``.
        created: When, ISO 8601.
        command: Command line that repeats the run.
        versions: Package or device name to version.
        perplexity: By model, e.g. ``dense``, ``compressed (PyTorch)``, ``compressed (ONNX Runtime)``.
        speed: Tokens per second by phase, e.g. ``prefill``, ``decode``.
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
    perplexity: dict[str, float] = field(default_factory=dict)
    speed: dict[str, float] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary that names its format and version."""
        return {"format": FORMAT, "version": VERSION, **super().to_json()}

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
        return super().from_json({k: v for k, v in data.items() if k not in ("format", "version")}, where)

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
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            reason = error.strerror or str(error)
            raise InputError(f"cannot be read: {reason}", where=str(path), fix="pass a bundle") from error
        except ValueError as error:
            raise InputError(f"not a JSON file: {error}", where=str(path), fix="restore the file") from error
        return cls.from_json(data, str(path))


def _json_lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    items = (json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value)
    return "[\n  " + ",\n  ".join(items) + "\n ]"

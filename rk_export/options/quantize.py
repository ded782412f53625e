"""The step that stores matrices in few bits."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from rk_export.errors import FieldError
from rk_export.options.choices import require_choice
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.step import Stage, Step, listed

Rounding = Literal["rtn", "search", "gptq"]
Quantizer = Rounding | Literal["carry"]
QUANTIZERS: tuple[Quantizer, ...] = ("rtn", "search", "gptq", "carry")
# The token table and, where it has weights of its own, the output projection.
TABLES = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Quantize(Step):
    """Matrices are stored in INT8, INT4 or INT2. Where two steps name the same matrix, the later one holds.

    Args:
        targets: What is quantized: `all`, `layers` (every matrix of the layers), a role (`q`, `k`, `v`, `o`, `gate`,
            `up`, `down`, `expert`), `embed_tokens`, `lm_head`, a pattern such as `layers.*.mlp.down_proj`, or a
            regular expression after `re:`. A name that matches nothing is an error.
        ignore: What is left out of the targets, named in the same way.
        bits: 2, 4 or 8; `auto` lets a budget of bytes, bits or time choose for every matrix by itself. Under another
            budget, or without one, `auto` is 4, and 8 for `embed_tokens` and `lm_head`; a line says so.
        block: Columns that share a scale: 16, 32, 64, 128 or 256. Without it 32.
        symmetric: Whether no zero points are stored.
        activations: 16 leaves inputs in floats. 8 also quantizes the inputs of 8-bit matrices (W8A8), for fast
            prefill on a CPU.
        quantizer: How numbers are rounded: `rtn` to nearest, `search` also searches the scales, `gptq` also spreads
            each column's error over the columns to come (2210.17323). `carry` takes the codes of a quantized checkpoint
            over as they are, where the graph can hold them. Without it the other steps say, else `gptq`.
    """

    name: ClassVar[str] = "quantize"
    stage: ClassVar[Stage] = "quantize"
    repeats: ClassVar[bool] = True

    targets: tuple[str, ...] = listed(("layers",))
    ignore: tuple[str, ...] = listed(())
    bits: Literal["auto"] | int = 4
    block: int | None = None
    symmetric: bool = True
    activations: int = 16
    quantizer: Quantizer | None = field(default=None, metadata={"key": "with"})

    def __post_init__(self) -> None:
        require_choice("quantizer", self.quantizer, (*QUANTIZERS, None), "quantize.with")
        if not self.targets:
            raise FieldError(
                "it names nothing", where="quantize.targets", fix="name layers, or drop the step"
            )
        for name in self.targets:
            _check_pattern(name, "quantize.targets")
        for name in self.ignore:
            _check_pattern(name, "quantize.ignore")
        if self.bits == "auto" and (self.block is not None or not self.symmetric or self.activations != 16):
            raise FieldError(
                "auto chooses block, symmetry and activations too", where="quantize.bits", fix="drop them"
            )
        if isinstance(self.bits, str) and self.bits != "auto":
            raise FieldError(f"{self.bits!r} bits", where="quantize.bits", fix="choose 2, 4, 8 or auto")
        if self.activations == 8 and (self.block is not None or self.bits != 8 or not self.symmetric):
            raise FieldError(
                "int8 inputs go with 8-bit symmetric weights, one scale a row",
                where="quantize.activations",
                fix="set bits: 8, and drop block and symmetric",
            )
        self.spec(table=False)  # it refuses bits and blocks that cannot be packed

    def spec(self, *, table: bool) -> QuantSpec:
        """Return the format of a matrix.

        Args:
            table: Whether it is the embedding or the output projection; `auto` gives them 8 bits.
        """
        if self.bits == "auto":
            return QuantSpec(8 if table else 4, 32)
        if self.activations == 8:
            return W8A8
        return QuantSpec(
            self.bits, 32 if self.block is None else self.block, self.symmetric, activations=self.activations
        )

    def takes(self, names: Iterable[str]) -> bool:
        """Whether the step quantizes a matrix that is known by some names."""
        known = tuple(names)
        return any(matches(target, known) for target in self.targets) and not any(
            matches(target, known) for target in self.ignore
        )

    def describe(self) -> str:
        """Return what it does, in words for the model card."""
        what = " and ".join(self.targets)
        if self.bits == "auto":
            return f"{what} in the formats that lose least"
        inputs = "with INT8 inputs" if self.activations == 8 else f"in blocks of {self.block or 32}"
        return f"{what} in INT{self.bits} {inputs}"


def matches(target: str, names: Iterable[str]) -> bool:
    """Whether a target or an entry of `ignore` means a matrix that is known by some names."""
    if target.startswith("re:"):
        expression = re.compile(target[3:])
        return any(expression.fullmatch(name) for name in names)
    return any(fnmatchcase(name, target) for name in names)


def names_of(role: str, path: str, layer: int) -> tuple[str, ...]:
    """Return the names of a layer's matrix that targets may use."""
    return ("all", "layers", role, f"layers.{layer}.{path}")


def names_of_table(table: str) -> tuple[str, ...]:
    """Return the names of the embedding or of the output projection that targets may use."""
    return ("all", table)


def _check_pattern(name: str, where: str) -> None:
    if not name.startswith("re:"):
        return
    try:
        re.compile(name[3:])
    except re.error as error:
        raise FieldError(
            f"{name[3:]!r} is no regular expression ({error})", where=where, fix="correct it"
        ) from error

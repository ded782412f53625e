"""Which matrices are factorized together, at which rank, and what the whole model may cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from rk_export.errors import FieldError
from rk_export.options.choices import require_choice

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}

# Every matrix by itself; conv_in and conv_out are those around a short convolution.
SINGLE_GROUPS = ("q", "k", "v", "o", "conv_in", "conv_out", "gate", "up", "down")
# Matrices that may be factorized together: they read the same input. A group of one is the paper's
# "separate" baseline.
GROUPS: dict[str, tuple[str, ...]] = {
    "qk": ("q", "k"),
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    **{role: (role,) for role in SINGLE_GROUPS},
}

DEFAULT_GROUPS = ("qk", "gate_up")

Gauge = Literal["orthogonal", "balanced"]
# How a kept share is spread over the matrices by their spectra alone.
Allocation = Literal["uniform", "energy", "gavish-donoho", "effective-rank", "stable-rank"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


@dataclass(frozen=True)
class RankRule:
    """How a rank is chosen: a kept ratio of the parameters, an explicit rank, or a share of the energy."""

    kind: Literal["keep", "rank", "energy"]
    value: float

    def __post_init__(self) -> None:
        if self.kind not in ("keep", "rank", "energy"):
            raise FieldError(
                f"unknown rank rule {self.kind!r}", where="rank", fix="choose keep, rank or energy"
            )
        if self.kind == "rank":
            if not math.isfinite(self.value) or self.value < 1 or self.value != int(self.value):
                raise FieldError(
                    f"{self.value} is not a rank", where=self.kind, fix="give a whole number of at least 1"
                )
        else:
            _check_share(self.value, self.kind)


BudgetKind = Literal["keep", "size", "mean_bits", "speed_up"]
BUDGET_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
BUDGET_MEANINGS: dict[BudgetKind, str] = {
    "keep": "Share of the parameters of the matrices that may be factorized, between 0 and 1.",
    "size": "Bytes of the model's files: `90MB`, or `int4` for what plain INT4 takes.",
    "mean_bits": "Mean bits of a parameter of the layers, scales included, from 2 to 16.",
    "speed_up": "Time of the dense float graph over that of the compressed one, above 1.",
}


@dataclass(frozen=True)
class Budget:
    """A limit on the cost of the whole model. The planner spends it on rank, bits and blocks together.

    Args:
        kind: What is counted, see `BUDGET_MEANINGS`.
        value: The amount; `int4` as a size.
        phase: What `speed_up` counts: `prefill` or `decode`.
    """

    kind: BudgetKind
    value: float | Literal["int4"]
    phase: Literal["prefill", "decode"] = "decode"

    def __post_init__(self) -> None:
        require_choice("budget", self.kind, BUDGET_KINDS, "budget")
        if self.phase not in ("prefill", "decode"):
            raise FieldError(
                f"unknown phase {self.phase!r}", where="budget.phase", fix="choose prefill or decode"
            )
        if self.phase == "prefill" and self.kind != "speed_up":
            raise FieldError("a phase goes with speed_up", where="budget.phase", fix="drop it")
        if self.value == "int4" and self.kind == "size":
            return
        if isinstance(self.value, str):
            raise FieldError(f"{self.value!r} is no budget", where=self.kind, fix="give a number above 0")
        if self.kind == "keep":
            _check_share(self.value, self.kind)
        if not math.isfinite(self.value) or self.value <= 0:
            raise FieldError(f"{self.value} is no budget", where=self.kind, fix="give a number above 0")
        if self.kind == "mean_bits" and not 2 <= self.value <= 16:
            raise FieldError(f"{self.value} bits", where=self.kind, fix="give a mean between 2 and 16")
        if self.kind == "speed_up" and self.value <= 1:
            raise FieldError(f"{self.value} is no speed-up", where=self.kind, fix="give a factor above 1")

    @property
    def amount(self) -> float:
        """The value, once it is a number.

        Raises:
            ValueError: A size still is that of plain INT4.
        """
        if isinstance(self.value, str):
            raise ValueError("the size of plain INT4 is known with the model only")
        return self.value

    @property
    def flag(self) -> str:
        """The flag of the command line that asks for it."""
        return f"--{self.kind.replace('_', '-')}"

    @property
    def name(self) -> str:
        """The budget in words."""
        return {
            "keep": "share of the parameters",
            "size": "size",
            "mean_bits": "mean bits",
            "speed_up": "speed-up",
        }[self.kind]

    def json_form(self) -> dict[str, Any]:
        """Return it as a recipe file has it: `{"size": 90000000.0}`."""
        value = self.value
        if self.kind == "size" and not isinstance(value, str):
            value = round(value)
        return {self.kind: value, **({"phase": self.phase} if self.kind == "speed_up" else {})}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema as schema

        def optional(kind: CoreSchema) -> Any:
            return schema.typed_dict_field(kind, required=False)

        number = schema.float_schema(strict=True)
        size = schema.no_info_before_validator_function(
            bytes_of,
            schema.union_schema([number, schema.literal_schema(["int4"])]),
            json_schema_input_schema=schema.union_schema([number, schema.str_schema()]),
        )
        phase = schema.literal_schema(["prefill", "decode"])
        keys = {
            "keep": optional(number),
            "size": optional(size),
            "mean_bits": optional(number),
            "speed_up": optional(number),
            "phase": optional(phase),
        }
        table = schema.typed_dict_schema(keys, extra_behavior="forbid")
        return schema.no_info_after_validator_function(_budget_of, table)


def bytes_of(value: Any) -> Any:
    """Return the bytes that a size like 90MB, 1.2GB or 90000000 stands for; what is no text is left as it is.

    Raises:
        InputError: If it is not a size.
    """
    if not isinstance(value, str) or value == "int4":
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", value.strip().lower())
    if match is None:
        raise FieldError(f"{value!r} is no size", where="size", fix="write 90MB or 1.2GB")
    return float(match[1]) * _UNITS[match[2]]


class _SizeText:
    """Reads a size that is written as text."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        from pydantic_core import core_schema as schema

        number = handler(source)
        written = schema.union_schema([number, schema.str_schema()])
        return schema.no_info_before_validator_function(bytes_of, number, json_schema_input_schema=written)


# Bytes; a file may say 90MB.
Bytes = Annotated[float, _SizeText()]


def share_or_size(step: str, keep: float | None, size: float | None) -> Budget:
    """Return the budget of a step that takes a share of the parameters or a size.

    Raises:
        InputError: Neither is given, or both are.
    """
    if (keep is None) == (size is None):
        what = "keep and size both say how much stays" if size else "nothing says how much stays"
        raise FieldError(what, where=step, fix="give keep, or size")
    return Budget("size", size) if size is not None else Budget("keep", cast(float, keep))


def share_and_size(step: str, budget: Budget) -> tuple[float | None, float | None]:
    """Return the fields `keep` and `size` of such a step.

    Raises:
        InputError: The budget is neither.
    """
    if budget.kind not in ("keep", "size"):
        raise FieldError(
            f"the step {step} has no price in {budget.name}", where=budget.flag, fix="give --keep or --size"
        )
    return (budget.amount, None) if budget.kind == "keep" else (None, budget.amount)


def _budget_of(given: dict[str, Any]) -> Budget:
    kinds = [kind for kind in BUDGET_KINDS if kind in given]
    if len(kinds) != 1:
        what = " and ".join(kinds) + " are two budgets" if kinds else "it holds no amount"
        raise FieldError(what, where="budget", fix=f"give one of {', '.join(BUDGET_KINDS)}")
    phase = {"phase": given["phase"]} if "phase" in given else {}
    return Budget(kinds[0], given[kinds[0]], **phase)


def _check_share(value: float, where: str) -> None:
    if not 0 < value < 1:
        raise FieldError(f"{value} is not a share between 0 and 1", where=where, fix="0.9 keeps nine tenths")

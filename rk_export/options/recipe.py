"""What a user may ask for: frozen values, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

from rk_export.errors import FieldError
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.choices import require_choice
from rk_export.options.method import STAGES, MethodOptions
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.ranks import ALLOCATIONS, DEFAULT_GROUPS, GROUPS, Allocation, Budget, Gauge, RankRule
from rk_export.options.texts import TextFile

# Exact reparameterizations, in the order in which they are applied.
PREPARATIONS = ("fold", "rotate", "rotate-heads", "scale")
# `fold` for the norms in front of one kind of block alone.
PARTS_OF_FOLD = ("fold-attention", "fold-mlp")

# Parity is measured on prompts of 32 tokens, and on what follows them.
SHORTEST_CONTEXT = 64

# Whether matrices that come quantized are quantized anew, or keep their codes.
Recompute = Literal["all", "none"]
GraphTarget = Literal["cpu", "cuda", "portable"]


@dataclass(frozen=True)
class Recipe:
    """Everything a user may choose about compression; validated on construction.

    Args:
        groups: Names from `GROUPS`; no role may stand in two of them. Empty factorizes nothing. None leaves it to
            the rule: a budget may factorize every matrix by itself, a rank rule takes `DEFAULT_GROUPS`.
        qk: Factorize the group qk `whole` or `per-head` (one factor pair per KV group).
        rank: The rank rule of every factorized group; None keeps 0.95 of the groups that are named, and
            factorizes nothing where none is.
        allocation: How the share of a rank rule `keep` is spread: `uniform` keeps it of every group, the others give
            ranks in proportion to what they see in each spectrum, and keep it of all groups together.
        rank_multiple: Ranks are rounded down to a multiple of it; None chooses by model size and bits.
        gauge: Which factor carries the singular values.
        quant: Quantization of linear layers, or None to keep floats.
        embedding_quant: Quantization of the embedding and lm_head, or None to keep floats.
        ep: The execution provider the graph is made for: cpu (fp32), cuda (fp16), portable (fp16).
        accuracy_level: MatMulNBits' accuracy level: 4 computes in int8 on CPU, 0 in floats.
        form: `plain` factor pairs, or `identity`: rows of the matrix itself and coefficients for the others. None
            is plain for a rank rule, and lets a budget choose.
        prepare: Exact reparameterizations before anything else, names from `PREPARATIONS` or `PARTS_OF_FOLD`. None
            takes those that lower the predicted loss; the plan names them.
        quantizer: `rtn` rounds to nearest, `search` also searches the scales, `gptq` also spreads each column's
            error over the columns to come, which needs the metric self or corpus.
        calibration: The metric and its text.
        budget: What the whole model may cost; None applies `rank` and `quant` to every matrix alike.
        correction: Rank of a float branch that corrects the error of every dense quantized matrix; 0 for none.
        methods: What methods are asked for, in the order in which they work: structures that go first, at most one
            method that decides every matrix, recovery.
        context_length: Tokens of prompt and answer together that the bundle takes; None takes the model's context.
        recompute: `none` carries the codes, scales and zero points of a quantized checkpoint over as they are, where
            MatMulNBits can hold them; `all` quantizes the values that they stand for anew.
    """

    groups: tuple[str, ...] | None = None
    qk: Literal["whole", "per-head"] = "whole"
    rank: RankRule | None = None
    allocation: Allocation = "uniform"
    rank_multiple: int | None = None
    gauge: Gauge = "orthogonal"
    quant: QuantSpec | None = QuantSpec(4, 32)
    embedding_quant: QuantSpec | None = QuantSpec(8, 32)
    ep: GraphTarget = "cpu"
    accuracy_level: int = 4
    form: Literal["plain", "identity"] | None = None
    prepare: tuple[str, ...] | None = None
    quantizer: Literal["rtn", "search", "gptq"] = "gptq"
    calibration: CalibrationOptions = CalibrationOptions()
    budget: Budget | None = None
    correction: int = 0
    methods: tuple[MethodOptions, ...] = ()
    context_length: int | None = None
    recompute: Recompute = "all"

    def __post_init__(self) -> None:
        self._check_groups()
        require_choice("choice", self.qk, ("whole", "per-head"), "--qk")
        if self.qk == "per-head" and "qk" not in (self.groups or DEFAULT_GROUPS):
            raise FieldError("per-head needs the group qk", where="--qk", fix="add qk to --groups")
        require_choice("gauge", self.gauge, ("orthogonal", "balanced"), "--gauge")
        require_choice("execution provider", self.ep, ("cpu", "cuda", "portable"), "--ep")
        require_choice("level", self.accuracy_level, (0, 1, 4), "--accuracy-level")
        require_choice("form", self.form, ("plain", "identity", None), "--form")
        require_choice("allocation", self.allocation, ALLOCATIONS, "--allocation")
        if self.allocation != "uniform" and (self.rank_rule.kind != "keep" or self.budget or self.deciding):
            raise FieldError(
                f"{self.allocation} spreads the share of a rank rule",
                where="--allocation",
                fix="give --keep SHARE with --uniform, or drop it",
            )
        if self.allocation != "uniform" and self.qk == "per-head":
            raise FieldError(
                "it gives one rank to each group", where="--allocation", fix="drop it, or --qk per-head"
            )
        require_choice("quantizer", self.quantizer, ("rtn", "search", "gptq"), "--quantizer")
        for name in self.prepare or ():
            require_choice("preparation", name, (*PREPARATIONS, *PARTS_OF_FOLD), "--prepare")
        if "rotate" in (self.prepare or ()) and "fold" not in (self.prepare or ()):
            raise FieldError("rotate needs fold", where="--prepare", fix="add fold: fold,rotate")
        require_choice("choice", self.recompute, ("all", "none"), "--recompute")
        if self.recompute == "none":
            self._check_carried()
        self._check_int8()
        self._check_methods()
        if self.context_length is not None and self.context_length < SHORTEST_CONTEXT:
            raise FieldError(
                f"a context of {self.context_length} tokens is too short to verify a bundle in",
                where="--context-length",
                fix=f"give at least {SHORTEST_CONTEXT}",
            )
        if self.rank_multiple is not None and self.rank_multiple < 1:
            raise FieldError(
                f"{self.rank_multiple} is below 1", where="--rank-multiple", fix="give 1 for no rounding"
            )

    def _check_groups(self) -> None:
        seen: dict[str, str] = {}
        for group in self.groups or ():
            if group not in GROUPS:
                raise FieldError(
                    f"unknown group {group!r}", where="--groups", fix=f"choose from {', '.join(GROUPS)}"
                )
            for role in GROUPS[group]:
                if role in seen:
                    raise FieldError(
                        f"{role!r} stands in both {seen[role]!r} and {group!r}",
                        where="--groups",
                        fix="name each matrix once",
                    )
                seen[role] = group

    def _check_carried(self) -> None:
        """Refuse what would change matrices whose codes are to stay."""
        changes = {
            "--groups": self.groups,
            "--form": self.form,
            "--qk": self.qk != "whole",
            "--allocation": self.allocation != "uniform",
            "--keep, --rank or --energy": self.rank,
            "a budget": self.budget,
            "--prepare": self.prepare,
            "--correction": self.correction,
            **{method.asked_by: True for method in self.methods},
        }
        if asked := [name for name, value in changes.items() if value]:
            raise FieldError(
                f"codes that are carried over cannot be changed, which {asked[0]} does",
                where="--recompute",
                fix=f"drop {asked[0]}, or --recompute none",
            )

    def _check_int8(self) -> None:
        if self.quant is not None and self.quant.activations == 8 and self.ep != "cpu":
            raise FieldError(
                f"int8 inputs have no kernels in a graph for {self.ep}",
                where="quant",
                fix="use them with --ep cpu, or choose weight-only quantization",
            )
        if self.embedding_quant is not None and self.embedding_quant.activations == 8:
            raise FieldError(
                "an embedding has no inputs to quantize",
                where="embedding_quant",
                fix="choose weight-only quantization for it",
            )

    def _check_methods(self) -> None:
        """Refuse methods that contradict each other, or how their sites must look."""
        for first, second in pairwise(self.methods):
            if first.stage == second.stage:
                what = (
                    "decide what stays of every matrix"
                    if first.stage == "decide"
                    else f"{first.stage} the model"
                )
                raise FieldError(
                    f"both {what}", where=f"{first.name} and {second.name}", fix="choose one of the two"
                )
            if STAGES.index(first.stage) > STAGES.index(second.stage):
                raise FieldError(
                    f"{second.name} comes before {first.name}", where="methods", fix="exchange the two"
                )
        if self.deciding is not None:
            self._check_single(self.deciding)
        for method in self.methods:
            method.check_with(self)
        if self.correction:
            self._check_correction()

    def _check_correction(self) -> None:
        where = "--correction"
        if self.correction < 0:
            raise FieldError(f"rank {self.correction}", where=where, fix="give 0 or more")
        if self.quant is None or self.quant.activations == 8:
            raise FieldError(
                "only weight-only quantization is corrected", where=where, fix="give --bits 2, 4 or 8"
            )
        if self.deciding is not None:
            raise FieldError(
                f"{self.deciding.name} leaves factor pairs, and only dense quantized matrices are corrected",
                where=where,
                fix="drop it",
            )
        if self.budget is not None:
            raise FieldError("a budget does not price corrections", where=where, fix="drop one of the two")

    def _check_single(self, method: MethodOptions) -> None:
        if any(len(GROUPS[group]) > 1 for group in self.groups or ()):
            raise FieldError(
                "it decides matrix by matrix, so joint groups cannot follow it",
                where=f"{method.name} and --groups",
                fix="drop --groups",
            )
        if self.qk != "whole" or (method.decides_form and self.form is not None):
            raise FieldError(
                "it decides the form of every matrix itself", where=method.name, fix="drop --form and --qk"
            )
        if self.calibration.prefix:
            raise FieldError(
                "its parts do not depend on the compressed prefix", where=method.name, fix="drop --prefix"
            )

    def with_texts(self, files: tuple[Path, ...]) -> Recipe:
        """Return the options with the paths of those texts that are among some files, by content."""
        corpus = self.calibration.corpus
        if corpus is None or not files:
            return self
        return replace(self, calibration=replace(self.calibration, corpus=corpus.found_in(files)))

    @property
    def missing_text(self) -> TextFile | None:
        """The calibration text, where only its name and content are known."""
        corpus = self.calibration.corpus
        return corpus if corpus is not None and corpus.path is None else None

    @property
    def deciding(self) -> MethodOptions | None:
        """The method that decides what stays of every matrix; None leaves that to ranks and budgets."""
        return next((method for method in self.methods if method.stage == "decide"), None)

    @property
    def weighs_outputs(self) -> bool:
        """Whether anything weighs the outputs of matrices by the loss; rounding weighs their inputs alone."""
        methods = any(method.weighs_outputs for method in self.methods)
        return bool(self.budget or self.rank or self.groups or methods)

    @property
    def rank_rule(self) -> RankRule:
        """The rank rule of the groups that are factorized without a budget."""
        return self.rank or RankRule("keep", 0.95)

    @property
    def preparations(self) -> tuple[str, ...]:
        """The reparameterizations that were named, or decided on."""
        return self.prepare or ()

    @property
    def prepared_for(self) -> QuantSpec | None:
        """The format that reparameterizations are to be chosen for; None where they are named or nothing is rounded.

        A budget offers several formats: the one that rounds most of the model then stands for all.
        """
        if self.prepare is not None or not self.calibration.uses_text:
            return None
        if self.recompute == "none":
            return None  # they would move the values off their grid
        if self.budget is not None and self.budget.kind == "speed_up":
            return W8A8
        if self.budget is not None and self.budget.kind in ("size", "bits"):
            return QuantSpec(4, 32)
        return self.quant

    @property
    def float_dtype(self) -> Literal["fp32", "fp16"]:
        """The float type of the exported graph."""
        return "fp32" if self.ep == "cpu" else "fp16"

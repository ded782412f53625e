"""What a user may ask for: frozen values, validated on construction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from rk_export.errors import FieldError
from rk_export.options.methods import BaselOptions, CapOptions, PruneOptions, require_choice

# Matrices that may be factorized together: they read the same input. A group of one is the paper's
# "separate" baseline.
GROUPS: dict[str, tuple[str, ...]] = {
    "qk": ("q", "k"),
    "qkv": ("q", "k", "v"),
    "gate_up": ("gate", "up"),
    **{role: (role,) for role in ("q", "k", "v", "o", "gate", "up", "down")},
}

# Exact reparameterizations, in the order in which they are applied.
PREPARATIONS = ("fold", "rotate", "rotate-heads", "scale")
# `fold` for the norms in front of one kind of block alone.
PARTS_OF_FOLD = ("fold-attention", "fold-mlp")

DEFAULT_GROUPS = ("qk", "gate_up")
SINGLE_GROUPS = ("q", "k", "v", "o", "gate", "up", "down")

# Parity is measured on prompts of 32 tokens, and on what follows them.
SHORTEST_CONTEXT = 64

# Whether matrices that come quantized are quantized anew, or keep their codes.
Recompute = Literal["all", "none"]
Provider = Literal["cpu", "cuda", "portable"]
Gauge = Literal["orthogonal", "balanced"]
# How a kept share is spread over the matrices by their spectra alone.
Allocation = Literal["uniform", "energy", "gavish-donoho", "effective-rank", "stable-rank"]
ALLOCATIONS: tuple[Allocation, ...] = get_args(Allocation)


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix is quantized: blockwise and weight-only, or to int8 together with its input.

    Args:
        bits: 2, 4 or 8.
        block_size: Columns that share a scale: a power of two from 16 to 256; 0 is one scale a row of the matrix.
        symmetric: No stored zero points.
        activations: 16 leaves the input in floats; 8 quantizes it to int8 as it arrives (W8A8), which takes
            8 bits, block size 0 and symmetric weights.
    """

    bits: int
    block_size: int
    symmetric: bool = True
    activations: int = 16

    def __post_init__(self) -> None:
        if self.activations == 8 and (self.bits, self.block_size, self.symmetric) == (8, 0, True):
            return
        if self.activations != 16:
            raise FieldError(
                f"{self.activations}-bit activations do not go with {self.bits} bits in blocks of {self.block_size}",
                where="quant",
                fix="8-bit activations take bits 8, block_size 0 and symmetric weights; 16 leaves them in floats",
            )
        if self.bits not in (2, 4, 8):
            raise FieldError(
                f"{self.bits} bits cannot be packed",
                where="--bits or --embedding-bits",
                fix="choose 2, 4 or 8 (16 keeps the matrix in floats)",
            )
        if self.block_size not in (16, 32, 64, 128, 256):
            raise FieldError(
                f"a block of {self.block_size} columns is not supported",
                where="--block",
                fix="choose 16, 32, 64, 128 or 256",
            )

    def details(self) -> dict[str, Any]:
        """Return what a finding says of it."""
        inputs = {"activations": 8} if self.activations == 8 else {"block": self.block_size}
        return {"bits": self.bits, **inputs}


@dataclass(frozen=True)
class RankRule:
    """How a rank is chosen: a kept ratio of the parameters, an explicit rank, or a share of the energy."""

    kind: Literal["keep", "rank", "energy"]
    value: float

    def __post_init__(self) -> None:
        where = f"--{self.kind}"
        if self.kind not in ("keep", "rank", "energy"):
            raise FieldError(
                f"unknown rank rule {self.kind!r}", where="rank", fix="choose keep, rank or energy"
            )
        if self.kind == "rank":
            if not math.isfinite(self.value) or self.value < 1 or self.value != int(self.value):
                raise FieldError(
                    f"{self.value} is not a rank", where=where, fix="give a whole number of at least 1"
                )
        elif not 0 < self.value < 1:
            raise FieldError(
                f"{self.value} is not a share between 0 and 1", where=where, fix="0.9 keeps nine tenths"
            )


# Weight-only INT8 and INT4 as the command line's defaults have them, and int8 weights with int8 inputs.
W8A8 = QuantSpec(8, 0, activations=8)


@dataclass(frozen=True)
class Budget:
    """What the whole model may cost; the planner spends it on rank, bits, blocks and correction together.

    Args:
        kind: `keep` is a share of the parameters of the matrices in `groups`, `size` the bytes of the model's
            files, `bits` the mean bits of a linear layer's parameter, scales included, `speed_up` the time of
            the dense float graph over that of the compressed one.
        value: The amount.
        phase: What `speed_up` counts: `prefill` or `decode`.
    """

    kind: Literal["keep", "size", "bits", "speed_up"]
    value: float
    phase: Literal["prefill", "decode"] = "decode"

    def __post_init__(self) -> None:
        where = f"--{self.kind.replace('_', '-')}"
        if self.kind == "keep" and not 0 < self.value < 1:
            raise FieldError(
                f"{self.value} is not a share between 0 and 1", where=where, fix="0.9 keeps nine tenths"
            )
        if not math.isfinite(self.value) or self.value <= 0:
            raise FieldError(f"{self.value} is no budget", where=where, fix="give a number above 0")
        if self.kind == "bits" and not 2 <= self.value <= 16:
            raise FieldError(f"{self.value} bits", where=where, fix="give a mean between 2 and 16")
        if self.kind == "speed_up" and self.value <= 1:
            raise FieldError(f"{self.value} is no speed-up", where=where, fix="give a factor above 1")
        if self.phase not in ("prefill", "decode"):
            raise FieldError(f"unknown phase {self.phase!r}", where="--phase", fix="choose prefill or decode")


@dataclass(frozen=True)
class CalibrationOptions:
    """Where the second moments of the matrices' inputs come from.

    Args:
        metric: `none` weighs all inputs alike (2402.16319), `gain` by the norm's gain in front, `self` by text
            that the model samples itself (data-free), `corpus` by a text file.
        corpus: The text file of `corpus`, else None.
        tokens: Tokens to sample or to read.
        seed: Of the sampling.
        gradients: Weigh outputs by the loss' gradients, from one backward pass; else every matrix by its relative
            error, layer by layer.
        prefix: Take the moments of the inputs anew through the part that is compressed already, layer by layer,
            while matrices are factorized and quantized; plans are made from those of the dense model either way.
    """

    metric: Literal["none", "gain", "self", "corpus"] = "self"
    corpus: str | None = None
    tokens: int = 8192
    seed: int = 0
    gradients: bool = True
    prefix: bool = False

    def __post_init__(self) -> None:
        if self.metric not in ("none", "gain", "self", "corpus"):
            raise FieldError(
                f"unknown metric {self.metric!r}",
                where="--metric",
                fix="choose none, gain, self or corpus:FILE",
            )
        if (self.metric == "corpus") != (self.corpus is not None):
            raise FieldError("the metric corpus reads a text file", where="--metric", fix="write corpus:FILE")
        if self.tokens < 512:
            raise FieldError(
                f"{self.tokens} tokens are too few for second moments",
                where="--calibration-tokens",
                fix="give at least 512",
            )

    @property
    def uses_text(self) -> bool:
        """Whether tokens run through the model."""
        return self.metric in ("self", "corpus")


@dataclass(frozen=True)
class CompressOptions:
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
        device: Where factorization and quantization run: auto, cpu, cuda or cuda:N.
        form: `plain` factor pairs, or `identity`: rows of the matrix itself and coefficients for the others. None
            is plain for a rank rule, and lets a budget choose.
        prepare: Exact reparameterizations before anything else, names from `PREPARATIONS` or `PARTS_OF_FOLD`. None
            takes those that lower the predicted loss; the plan names them.
        quantizer: `rtn` rounds to nearest, `search` also searches the scales, `gptq` also spreads each column's
            error over the columns to come, which needs the metric self or corpus.
        calibration: The metric and its text.
        budget: What the whole model may cost; None applies `rank` and `quant` to every matrix alike.
        heal: Steps of recovery after compression; 0 skips it.
        correction: Rank of a float branch that corrects the error of every dense quantized matrix; 0 for none.
        prune: Whole structures that go first; None keeps all.
        basel: Selects singular directions by training on a task's text; `rank` says how many, by `keep` or `energy`.
        cap: Splits matrices into low rank and sparse parts; `budget` says how much stays, by `keep` or `size`.
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
    ep: Provider = "cpu"
    accuracy_level: int = 4
    device: str = "auto"
    form: Literal["plain", "identity"] | None = None
    prepare: tuple[str, ...] | None = None
    quantizer: Literal["rtn", "search", "gptq"] = "gptq"
    calibration: CalibrationOptions = CalibrationOptions()
    budget: Budget | None = None
    heal: int = 0
    correction: int = 0
    prune: PruneOptions | None = None
    basel: BaselOptions | None = None
    cap: CapOptions | None = None
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
        if self.allocation != "uniform" and (self.rank_rule.kind != "keep" or self.budget or self.basel):
            raise FieldError(
                f"{self.allocation} spreads the share of a rank rule",
                where="--allocation",
                fix="give --keep SHARE with --uniform or --method joint-rank, or drop it",
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
        if self.heal < 0:
            raise FieldError(f"{self.heal} steps", where="--heal", fix="give 0 or more")
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
            "pruning": self.prune,
            "--method": self.basel or self.cap,
            "--correction": self.correction,
            "--heal": self.heal,
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
        """Refuse a method that contradicts how its sites must look."""
        if self.basel is not None and self.cap is not None:
            raise FieldError(
                "both decide what stays of every matrix", where="basel and cap", fix="choose one of the two"
            )
        for name in ("basel", "cap"):
            if getattr(self, name) is not None:
                self._check_single(name)
        if self.basel is not None and (
            self.rank is None or self.rank.kind == "rank" or self.budget is not None
        ):
            raise FieldError(
                "basis selection ends at a kept share of the parameters, or of the importances",
                where="basel",
                fix="give --keep SHARE or --energy SHARE, and no other budget",
            )
        if self.cap is not None and self.rank is not None:
            raise FieldError(
                "a rank rule does not say how much is sparse",
                where="cap",
                fix="give --keep SHARE or --size BYTES",
            )
        if self.cap is not None and (self.budget is None or self.budget.kind not in ("keep", "size")):
            raise FieldError(
                "low rank and sparse parts are bought from a budget of parameters or bytes",
                where="cap",
                fix="give --keep SHARE or --size BYTES",
            )
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
        if self.basel is not None or self.cap is not None:
            name = "basel" if self.basel is not None else "cap"
            raise FieldError(
                f"{name} leaves factor pairs, and only dense quantized matrices are corrected",
                where=where,
                fix="drop it",
            )
        if self.budget is not None:
            raise FieldError("a budget does not price corrections", where=where, fix="drop one of the two")

    def _check_single(self, name: str) -> None:
        if any(len(GROUPS[group]) > 1 for group in self.groups or ()):
            raise FieldError(
                "it decides matrix by matrix, so joint groups cannot follow it",
                where=f"{name} and --groups",
                fix="drop --groups",
            )
        if self.qk != "whole" or (name == "cap" and self.form is not None):
            raise FieldError(
                "it decides the form of every matrix itself", where=name, fix="drop --form and --qk"
            )
        if self.calibration.prefix:
            raise FieldError(
                "its parts do not depend on the compressed prefix", where=name, fix="drop --prefix"
            )

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

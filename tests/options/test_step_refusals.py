"""What every step, the calibration and the target refuse by themselves, and that they read what they write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rk_export.errors import InputError
from rk_export.json_codec import read, to_json
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.heal.options import HealOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.methods.sslc.options import SslcOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.correct import Correct
from rk_export.options.factorize import Factorize
from rk_export.options.kinds import step_kinds
from rk_export.options.prepare import Prepare
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.quantize import Quantize
from rk_export.options.ranks import GROUPS, RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.step import STAGES, Step
from rk_export.options.target import Target
from rk_export.options.texts import TextFile

TASK = TextFile("task.txt", "0" * 64)


def wrong(value: object) -> Any:
    """Return a value of a type, or a choice, that the field does not have."""
    return value


# Each kind of step with some values that are not its defaults.
STEPS: tuple[Step, ...] = (
    PruneOptions(blocks=1, ffn_keep=0.75, kv_heads_keep=2),
    Prepare(("fold", "rotate-heads")),
    Prepare(),
    Factorize(("qk", "gate_up"), keep=0.9, allocation="energy", form="identity", gauge="balanced"),
    Factorize(("qk",), rank=8, qk="per-head", rank_multiple=16),
    BaselOptions(TASK, energy=0.4, bases="whitened", importance="second-order"),
    CapOptions(size=1e6, selector="auction"),
    SslcOptions(keep=0.5, stages=2),
    Quantize(("all",), ("down", "re:.*o_proj"), bits=2, block=16, symmetric=False, quantizer="search"),
    Quantize(bits=8, activations=8),
    Quantize(bits="auto", quantizer="carry"),
    Correct(4),
    HealOptions(steps=3, what=("norms",), precision="fp32"),
)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.name)
def test_a_step_reads_what_it_writes_under_its_name(step: Step) -> None:
    data = to_json(step)
    assert [*data] == [step.name]
    assert read(Step, data) == step
    assert step.describe()


def test_every_kind_of_step_is_tested() -> None:
    assert {type(step) for step in STEPS} == set(step_kinds())
    stages = [STAGES.index(kind.stage) for kind in step_kinds()]
    assert stages == sorted(stages)
    assert len({kind.name for kind in step_kinds()}) == len(step_kinds())


REFUSALS: list[tuple[Callable[[], object], str, str]] = [
    # prune
    (lambda: PruneOptions(), "prune", "nothing goes"),
    (lambda: PruneOptions(blocks=-1), "prune.blocks", "too few"),
    (lambda: PruneOptions(ffn_keep=0), "prune.ffn_keep", "not a share"),
    (lambda: PruneOptions(ffn_keep=1.1), "prune.ffn_keep", "not a share"),
    (lambda: PruneOptions(ffn_keep=float("nan")), "prune.ffn_keep", "not a share"),
    (lambda: PruneOptions(kv_heads_keep=0), "prune.kv_heads_keep", "too few"),
    # prepare
    (lambda: Prepare(("bend",)), "prepare", "unknown preparation 'bend'"),
    (lambda: Prepare(wrong("fold")), "prepare", "unknown preparation 'fold'"),
    (lambda: Prepare(("rotate",)), "prepare", "rotate needs fold"),
    # factorize
    (lambda: Factorize(("qk", "moe"), keep=0.9), "factorize.groups", "unknown group 'moe'"),
    (lambda: Factorize(("qk", "qkv"), keep=0.9), "factorize.groups", "'q' stands in both 'qk' and 'qkv'"),
    (lambda: Factorize(("qk", "qk"), keep=0.9), "factorize.groups", "stands in both"),
    (lambda: Factorize(keep=0.9, rank=8), "factorize", "keep and rank both say"),
    (lambda: Factorize(rank=8, energy=0.9), "factorize", "rank and energy both say"),
    (lambda: Factorize(keep=1.0), "keep", "not a share"),
    (lambda: Factorize(keep=float("nan")), "keep", "not a share"),
    (lambda: Factorize(energy=1.5), "energy", "not a share"),
    (lambda: Factorize(rank=0), "rank", "not a rank"),
    (lambda: Factorize(rank=-4), "rank", "not a rank"),
    (lambda: Factorize(keep=0.9, allocation=wrong("odd")), "factorize.allocation", "unknown allocation"),
    (lambda: Factorize(rank=8, allocation="energy"), "factorize.allocation", "spreads the share"),
    (lambda: Factorize(allocation="energy"), "factorize.allocation", "spreads the share"),
    (
        lambda: Factorize(("qk",), keep=0.9, allocation="energy", qk="per-head"),
        "factorize.allocation",
        "one rank",
    ),
    (lambda: Factorize(keep=0.9, qk=wrong("both")), "factorize.qk", "unknown choice 'both'"),
    (lambda: Factorize(("gate_up",), keep=0.9, qk="per-head"), "factorize.qk", "needs the group qk"),
    (lambda: Factorize(keep=0.9, qk="per-head", form="identity"), "factorize.form", "takes q and k whole"),
    (lambda: Factorize(keep=0.9, form=wrong("thin")), "factorize.form", "unknown form 'thin'"),
    (lambda: Factorize(keep=0.9, gauge=wrong("left")), "factorize.gauge", "unknown gauge 'left'"),
    (lambda: Factorize(keep=0.9, rank_multiple=0), "factorize.rank_multiple", "below 1"),
    # basel
    (lambda: BaselOptions(TASK), "basel", "ends at one share"),
    (lambda: BaselOptions(TASK, keep=0.5, energy=0.5), "basel", "ends at one share"),
    (lambda: BaselOptions(TASK, keep=2), "keep", "not a share"),
    (lambda: BaselOptions(TASK, keep=0.5, importance=wrong("odd")), "basel.importance", "unknown importance"),
    (lambda: BaselOptions(TASK, keep=0.5, bases=wrong("odd")), "basel.bases", "unknown choice"),
    (lambda: BaselOptions(TASK, keep=0.5, form=wrong("odd")), "basel.form", "unknown form"),
    (lambda: BaselOptions(TASK, keep=0.5, steps=0), "basel.steps", "too few"),
    (lambda: BaselOptions(TASK, keep=0.5, tune=-1), "basel.tune", "too few"),
    (lambda: BaselOptions(TASK, keep=0.5, batch_tokens=0), "basel.batch_tokens", "too few"),
    (lambda: BaselOptions(TASK, keep=0.5, new_basis=-1), "basel.new_basis", "too few"),
    (lambda: BaselOptions(TASK, keep=0.5, events=0), "basel.events", "too few"),
    (lambda: BaselOptions(TASK, keep=0.5, learning_rate=0), "basel.learning_rate", "out of range"),
    # cap
    (lambda: CapOptions(), "cap", "nothing says how much stays"),
    (lambda: CapOptions(keep=0.5, size=1e6), "cap", "keep and size both say"),
    (lambda: CapOptions(keep=1.0), "keep", "not a share"),
    (lambda: CapOptions(size=0), "size", "no budget"),
    (lambda: CapOptions(keep=0.5, selector=wrong("odd")), "cap.selector", "unknown selector"),
    (lambda: CapOptions(keep=0.5, steps=0), "cap.steps", "too few"),
    (lambda: CapOptions(keep=0.5, iterations=0), "cap.iterations", "too few"),
    (lambda: CapOptions(keep=0.5, window=0), "cap.window", "too few"),
    (lambda: CapOptions(keep=0.5, batch_tokens=0), "cap.batch_tokens", "too few"),
    (lambda: CapOptions(keep=0.5, learning_rate=float("inf")), "cap.learning_rate", "out of range"),
    # sslc
    (lambda: SslcOptions(), "sslc", "nothing says how much stays"),
    (lambda: SslcOptions(keep=0.5, size=1e6), "sslc", "keep and size both say"),
    (lambda: SslcOptions(keep=0.5, stages=0), "sslc.stages", "too few"),
    # quantize
    (lambda: Quantize(()), "quantize.targets", "names nothing"),
    (lambda: Quantize(("re:(",)), "quantize.targets", "no regular expression"),
    (lambda: Quantize(ignore=("re:[",)), "quantize.ignore", "no regular expression"),
    (lambda: Quantize(bits=3), "quantize.bits", "3 bits"),
    (lambda: Quantize(bits=16), "quantize.bits", "16 bits"),
    (lambda: Quantize(bits=wrong("few")), "quantize.bits", "'few' bits"),
    (lambda: Quantize(block=24), "quantize.block", "a block of 24"),
    (lambda: Quantize(block=512), "quantize.block", "a block of 512"),
    (lambda: Quantize(block=0), "quantize.block", "a block of 0"),
    (lambda: Quantize(bits="auto", block=32), "quantize.bits", "auto chooses"),
    (lambda: Quantize(bits="auto", symmetric=False), "quantize.bits", "auto chooses"),
    (lambda: Quantize(bits="auto", activations=8), "quantize.bits", "auto chooses"),
    (lambda: Quantize(bits=4, activations=8), "quantize.activations", "go with 8-bit"),
    (lambda: Quantize(bits=8, block=32, activations=8), "quantize.activations", "go with 8-bit"),
    (lambda: Quantize(bits=8, symmetric=False, activations=8), "quantize.activations", "go with 8-bit"),
    (lambda: Quantize(bits=8, activations=4), "quantize.activations", "4-bit activations"),
    (lambda: Quantize(quantizer=wrong("dice")), "quantize.with", "unknown quantizer 'dice'"),
    # correct
    (lambda: Correct(0), "correct.rank", "too few"),
    # heal
    (lambda: HealOptions(steps=0), "heal.steps", "too few"),
    (lambda: HealOptions(steps=1, batch_tokens=1), "heal.batch_tokens", "too few"),
    (lambda: HealOptions(steps=1, learning_rate=-1), "heal.learning_rate", "out of range"),
    (lambda: HealOptions(steps=1, temperature=0), "heal.temperature", "out of range"),
    (lambda: HealOptions(steps=1, warmup=1), "heal.warmup", "no share"),
    (lambda: HealOptions(steps=1, what=()), "heal.what", "cannot train"),
    (lambda: HealOptions(steps=1, what=("codes",)), "heal.what", "cannot train"),
    (lambda: HealOptions(steps=1, precision=wrong("fp8")), "heal.precision", "unknown precision 'fp8'"),
    # what surrounds the steps
    (lambda: CalibrationOptions(wrong("corpus")), "calibration.text", "unknown text 'corpus'"),
    (lambda: CalibrationOptions(tokens=511), "calibration.tokens", "too few"),
    (lambda: Target(wrong("tpu")), "target.ep", "unknown execution provider 'tpu'"),
    (lambda: Target(accuracy_level=3), "target.accuracy_level", "unknown level 3"),
    (lambda: Target(context_length=63), "target.context_length", "too short"),
    (lambda: RankRule(wrong("half"), 0.5), "rank", "unknown rank rule 'half'"),
    (lambda: RankRule("rank", 2.5), "rank", "not a rank"),
    (lambda: RankRule("rank", float("inf")), "rank", "not a rank"),
]


@pytest.mark.parametrize(
    ("build", "where", "what"), REFUSALS, ids=[f"{where}: {what}" for _, where, what in REFUSALS]
)
def test_a_refused_value_names_its_field_and_the_fix(
    build: Callable[[], object], where: str, what: str
) -> None:
    with pytest.raises(InputError) as caught:
        build()
    assert caught.value.where == where
    assert what in caught.value.what
    assert caught.value.fix


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_may_be_factorized(group: str) -> None:
    assert Recipe((Factorize((group,), keep=0.5),)).groups == (group,)


@pytest.mark.parametrize(
    ("step", "table", "layers"),
    [
        (Quantize(bits="auto"), QuantSpec(8, 32), QuantSpec(4, 32)),
        (Quantize(bits=4), QuantSpec(4, 32), QuantSpec(4, 32)),
        (Quantize(bits=2, block=16, symmetric=False), QuantSpec(2, 16, False), QuantSpec(2, 16, False)),
        (Quantize(bits=8, activations=8), W8A8, W8A8),
    ],
)
def test_formats_of_a_step(step: Quantize, table: QuantSpec, layers: QuantSpec) -> None:
    assert step.spec(table=True) == table
    assert step.spec(table=False) == layers


@pytest.mark.parametrize(("ep", "dtype"), [("cpu", "fp32"), ("cuda", "fp16"), ("portable", "fp16")])
def test_the_float_type_follows_the_provider(ep: Any, dtype: str) -> None:
    assert Target(ep).float_dtype == dtype


def test_what_a_calibration_is_weighed_by() -> None:
    assert [CalibrationOptions(text).metric for text in ("self", "gain", "none", TASK)] == [
        "self",
        "gain",
        "none",
        "corpus",
    ]
    assert CalibrationOptions().uses_text
    assert CalibrationOptions(TASK).uses_text
    assert not CalibrationOptions("gain").uses_text

"""Recipes for tests, from what differs between them."""

from __future__ import annotations

from typing import Any, Literal

from rk_export.options.calibration import CalibrationOptions
from rk_export.options.correct import Correct
from rk_export.options.factorize import Factorize
from rk_export.options.prepare import Prepare
from rk_export.options.quantization import QuantSpec
from rk_export.options.quantize import TABLES, Quantize
from rk_export.options.ranks import Budget, RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.step import STAGES, MethodOptions, Step
from rk_export.options.target import Target

INT4, INT8 = QuantSpec(4, 32), QuantSpec(8, 32)


def made_recipe(
    *,
    groups: tuple[str, ...] | None = None,
    rank: RankRule | None = None,
    quant: QuantSpec | Literal["auto"] | None = INT4,
    table: QuantSpec | Literal["auto"] | None = INT8,
    quantizer: Any = "gptq",
    prepare: tuple[str, ...] | Literal["auto"] = "auto",
    calibration: CalibrationOptions = CalibrationOptions(),
    budget: Budget | None = None,
    correction: int = 0,
    methods: tuple[MethodOptions, ...] = (),
    ep: Any = "cpu",
    accuracy_level: int = 4,
    context_length: int | None = None,
    **factorize: Any,
) -> Recipe:
    """Return a recipe.

    Args:
        groups: What is factorized. By default nothing is without an amount; a rank rule and a budget take their own.
        rank: How much of the groups stays; 0.95 of those that are named.
        quant: The format of the layers; `auto` under a budget that counts bits, where no other is given.
        table: The format of embedding and output projection, likewise.
        quantizer: How numbers are rounded.
        prepare: Reparameterizations.
        calibration: The text.
        budget: What the whole model may cost.
        correction: Rank of the correction.
        methods: Other steps, in any order.
        ep: Execution provider.
        accuracy_level: Of MatMulNBits.
        context_length: Of the bundle.
        **factorize: Other fields of the step factorize.
    """
    steps: list[Step] = [*methods, Prepare(prepare)]
    decided = any(method.stage == "decide" for method in methods)
    if groups and rank is None and budget is None:
        rank = RankRule("keep", 0.95)
    if not decided and groups != () and (rank or budget):
        amount: dict[str, Any] = (
            {} if rank is None else {rank.kind: int(rank.value) if rank.kind == "rank" else rank.value}
        )
        steps.append(Factorize(groups, **amount, **factorize))
    steps += _quantize(quant, ("layers",), quantizer)
    steps += _quantize(table, TABLES, quantizer)
    if correction:
        steps.append(Correct(correction))
    steps.sort(key=lambda step: STAGES.index(step.stage))
    return Recipe(tuple(steps), calibration, budget, Target(ep, accuracy_level, context_length))


def open_recipe(budget: Budget, **fields: Any) -> Recipe:
    """Return a recipe whose formats the budget chooses."""
    return made_recipe(budget=budget, **{"quant": "auto", "table": "auto", **fields})


def _quantize(
    spec: QuantSpec | Literal["auto"] | None, targets: tuple[str, ...], quantizer: Any
) -> list[Step]:
    if spec is None:
        return []
    if spec == "auto":
        return [Quantize(targets, bits="auto", quantizer=quantizer)]
    if spec.activations == 8:
        return [Quantize(targets, bits=8, activations=8, quantizer=quantizer)]
    return [
        Quantize(
            targets, bits=spec.bits, block=spec.block_size, symmetric=spec.symmetric, quantizer=quantizer
        )
    ]

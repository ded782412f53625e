"""Budgets from the command line to the bundle, on tiny models: what is chosen fits, is verified and is explained."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from made_recipes import made_recipe, open_recipe

from rk_export import compress, make_plan
from rk_export.commands.checks import check_options
from rk_export.commands.compression_inputs import compression_inputs
from rk_export.commands.model_costs import model_costs
from rk_export.commands.verify import verify
from rk_export.errors import InputError
from rk_export.methods.heal.options import HealOptions
from rk_export.model.sites import dense_sites
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.options.quantize import TABLES, Quantize
from rk_export.options.ranks import GROUPS, Budget
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.passes.numerics.curvature import Curvature, Inputs
from rk_export.plan import Plan, SitePlan
from rk_export.planning import budget, planner
from rk_export.planning.budget_units import TABLE_FORMATS, TIMED_FORMATS, WEIGHT_FORMATS, budget_unit
from rk_export.planning.candidates import Candidate, SearchSpace, candidates
from rk_export.planning.cost_table import CostTable, measure_costs
from rk_export.planning.plain_size import plain_int4_bytes
from rk_export.source.stored import StoredModel, open_source

TEXT = CalibrationOptions(tokens=1024)
SourceOf = Callable[..., StoredModel]


def options(kind: Any, value: float, **changes: Any) -> Recipe:
    return open_recipe(Budget(kind, value), **{"calibration": TEXT, **changes})


def matrix_parameters(source: StoredModel) -> int:
    return sum(
        layer.linear(item.path).weight.numel()
        for layer in source.layers()
        for item in source.architecture.projections(source.config, layer.index)
    )


def stored_parameters(source: StoredModel, plan: Plan) -> int:
    """Count what the sites of a plan hold, by the formulas of the forms."""
    total = 0
    for layer in source.layers():
        for site in plan.of_layer(layer.index):
            weights = [layer.linear(path).weight for path in site.paths]
            rows, columns = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
            saved = site.rank if site.form == "identity" else 0
            total += rows * columns if site.form == "dense" else site.rank * (rows + columns - saved)
    return total


@pytest.mark.parametrize("keep", [0.9, 0.6])
def test_a_share_is_kept_and_nearly_used_up(llama: Path, keep: float) -> None:
    source = open_source(llama)
    plan = make_plan(llama, options("keep", keep, quant=None, table=None, rank_multiple=1))
    used = stored_parameters(source, plan) / matrix_parameters(source)
    assert keep - 0.02 < used <= keep
    assert plan.predicted_loss is not None
    assert any(site.form != "dense" for site in plan.sites)


def test_less_budget_loses_more(llama: Path) -> None:
    losses = [make_plan(llama, options("mean_bits", bits)).predicted_loss for bits in (3.2, 4.5, 7)]
    assert losses == sorted(losses, key=lambda loss: -(loss or 0))
    assert losses[0] != losses[-1]


def test_mean_bits_are_kept(llama: Path) -> None:
    source = open_source(llama)
    plan = make_plan(llama, options("mean_bits", 4.7))
    rewritten = compression_inputs(source, plan.recipe).rewrite(plan)
    stored = {
        finding.target: finding.bytes_after
        for finding in rewritten.findings
        if (finding.details or {}).get("pass") == "quantize"
    }
    used = sum(stored[site.site] for site in plan.sites)
    assert 0.9 * 4.7 / 8 < used / matrix_parameters(source) <= 4.7 / 8


@pytest.mark.whole
def test_a_size_budget_makes_a_file_of_that_size(llama: Path, tmp_path: Path) -> None:
    size = 190_000
    report = compress(llama, tmp_path / "out", options("size", size), run=Run(threads=1))
    files = sum((tmp_path / "out" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    assert files <= size
    assert all(tier.passed for tier in report.parity if tier.bound is not None)
    tiers = {tier.tier: tier for tier in verify(tmp_path / "out", llama, run=Run(threads=1))}
    assert tiers["c"].passed
    # The same plan on the same model again: the reparameterization and the statistics are the same too.
    assert tiers["g"].max_error == 0


@pytest.mark.whole
@pytest.mark.parametrize(
    "arguments", [("--keep", 0.7, "--recipe", "int8"), ("--mean-bits", 4.5), ("--size", "200kB")]
)
def test_explain_names_the_runner_up(
    cli: Cli, llama: Path, tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    tokens = ("--set", "calibration.tokens=1024", "--threads", 1)
    ended = cli("compress", llama, "-o", tmp_path / "out", *arguments, *tokens)
    assert ended.code == 0, ended.err
    told = json.loads(cli("explain", tmp_path / "out", "--json").out)
    runners = [item["details"]["runner_up"] for item in told if "runner_up" in (item["details"] or {})]
    assert runners
    assert all("nats" in text for text in runners)


def test_too_small_a_budget_says_what_the_smallest_model_takes(llama: Path) -> None:
    with pytest.raises(InputError, match="smallest model that can be planned takes") as caught:
        make_plan(llama, options("size", 70_000))
    assert caught.value.where == "--size"


def test_matrices_without_statistics_get_the_format_that_was_asked_for(source_of: SourceOf) -> None:
    steps = (Quantize(bits="auto"), Quantize(("expert",), bits=4, block=16), Quantize(TABLES, bits=8))
    source, asked = source_of("mixtral"), Recipe(steps, TEXT, Budget("mean_bits", 5))
    inputs = compression_inputs(source, asked)
    assert inputs.statistics is not None
    layers = (
        (layer, dense_sites(layer, source.architecture.projections(source.config, layer.index), asked))
        for layer in source.layers()
    )
    spent = budget.spend(layers, budget_unit(source, asked, 8), inputs.statistics, None, torch.device("cpu"))
    formats = {site.quant for site in spent.sites if site.site.endswith("experts")}
    assert formats == {QuantSpec(4, 16)}


# --- the formats of a budget of bytes


def within_bytes(source: StoredModel, recipe: Recipe) -> Plan:
    inputs = compression_inputs(source, recipe)
    return planner.decide_plan(inputs.source, inputs.recipe, statistics=inputs.statistics, table=inputs.table)


def test_sites_that_one_product_computes_take_one_format(source_of: SourceOf) -> None:
    plan = within_bytes(source_of("llama"), options("mean_bits", 4.9))
    for layer in range(2):
        formats = {site.members: site.quant for site in plan.of_layer(layer)}
        assert formats["k",] == formats["v",]  # two of four heads: they have a shape of their own
        assert formats["gate",] == formats["up",]
    assert len({site.quant for site in plan.sites}) > 1
    assert {site.form for site in plan.sites} == {"dense"}


def test_one_format_costs_little(source_of: SourceOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """The predicted loss is close to what every matrix on its own would give, and far below one format for all."""
    source, asked = source_of("llama"), options("mean_bits", 4.9)
    together = within_bytes(source, asked).predicted_loss
    monkeypatch.setattr(budget, "packed_together", lambda found: [[index] for index in range(len(found))])
    alone = within_bytes(source, asked).predicted_loss
    assert together is not None
    assert alone is not None
    assert alone <= together < 1.1 * alone


def test_no_format_is_slow_and_gpus_get_those_that_they_have(source_of: SourceOf) -> None:
    assert all(spec is None or spec.block_size >= 32 for spec in (*WEIGHT_FORMATS, *TABLE_FORMATS))
    source = source_of("llama")
    for ep in ("cuda", "portable"):
        space = budget_unit(source, options("mean_bits", 5, ep=ep), 8).space
        assert {spec.bits for spec in (*space.formats, *space.pair_formats) if spec} == {4, 8}
    assert 2 in {spec.bits for spec in budget_unit(source, options("mean_bits", 5), 8).space.formats if spec}


def test_factor_pairs_are_looked_for_below_four_bits_or_when_asked_for(source_of: SourceOf) -> None:
    source = source_of("llama")

    def groups(kind: str, value: float, **changes: Any) -> tuple[str, ...] | None:
        return planner.with_default_groups(source, options(kind, value, **changes)).groups

    assert groups("mean_bits", 4.5) == ()
    assert groups("mean_bits", 4.49) == ("q", "k", "v", "o", "gate", "up", "down")
    assert groups("mean_bits", 4.5, form="identity") == groups("mean_bits", 4.49)
    assert groups("mean_bits", 4.5, groups=("o",)) == ("o",)
    assert groups("keep", 0.9) == groups("mean_bits", 4.49)
    plain = plain_int4_bytes(source, Recipe())
    assert groups("size", plain) == ()
    assert groups("size", plain - 15_000) == groups("mean_bits", 4.49)


def test_gradients_keep_their_directions_only_for_factor_pairs(source_of: SourceOf) -> None:
    for bits, dimensions in ((4.5, 1), (4, 2)):
        known = compression_inputs(source_of("llama"), options("mean_bits", bits)).statistics
        assert known is not None
        assert {gradient.ndim for gradient in known.gradients.values()} == {dimensions}


def space_of(cost: Callable[[int, int, Any], float], **changes: Any) -> SearchSpace:
    fields = {
        "formats": WEIGHT_FORMATS,
        "pair_formats": (None,),
        "forms": ("joint", "identity"),
        "rank_step": 4,
        "compensated": False,
        "kv_groups": 1,
        "cost": cost,
        "factorized": frozenset({GROUPS["o"]}),
        "is_open": lambda site: True,
    }
    return SearchSpace(**{**fields, **changes})


def only_o(space: SearchSpace) -> list[Candidate]:
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(24, 32, generator=generator), torch.randn(100, 32, generator=generator)
    curvature = Curvature(Inputs(X.T @ X / 100, token_peak=5.0), {"o": torch.ones(24)})
    site = SitePlan("layers.0.o", 0, ("o",), ("o_proj",), "dense", 0, None)
    return candidates(site, W, [(24, 32)], curvature, space)


def test_more_bits_and_more_rank_lose_less() -> None:
    found = only_o(space_of(lambda rows, columns, spec: rows * columns))
    dense = {item.plan.quant: item.loss for item in found if item.plan.form == "dense"}
    assert dense[None] == 0
    eight, four, two = (
        QuantSpec(bits, 32, symmetric=symmetric) for bits, symmetric in ((8, True), (4, False), (2, False))
    )
    assert dense[eight] < dense[four] < dense[two]
    for form in ("joint", "identity"):
        losses = [item.loss for item in found if item.plan.form == form]
        assert losses == sorted(losses, reverse=True)
    plain, identity = (
        {item.plan.rank: item.cost for item in found if item.plan.form == form}
        for form in ("joint", "identity")
    )
    assert all(identity[rank] == cost - rank * rank for rank, cost in plain.items())


def test_groups_that_were_not_asked_for_stay_dense() -> None:
    found = only_o(space_of(lambda rows, columns, spec: rows * columns, factorized=frozenset()))
    assert {item.plan.form for item in found} == {"dense"}


# --- a speed-up


def test_prices_follow_the_fit() -> None:
    table = CostTable("prefill", {None: (1.0, 0.5, 0.25)})
    assert table.milliseconds(2, 4, None) == 1 + 0.5 * 6 + 0.25 * 8


def test_products_are_timed_in_every_format() -> None:
    table = measure_costs([(64, 64), (512, 256)], TIMED_FORMATS, "decode", threads=1)
    assert set(table.coefficients) == set(TIMED_FORMATS)
    assert all(table.milliseconds(512, 256, spec) > 0 for spec in TIMED_FORMATS)
    floats = measure_costs([(64, 64), (2048, 1024)], (None,), "prefill", threads=1)
    assert floats.milliseconds(2048, 1024, None) > 4 * floats.milliseconds(256, 256, None)


def test_a_speed_up_is_bought_in_time(llama: Path) -> None:
    source = open_source(llama)
    per_entry = {None: 8.0, W8A8: 2.0, TIMED_FORMATS[0]: 6.0, TIMED_FORMATS[1]: 7.0}
    costs = CostTable("prefill", {spec: (0.0, 0.0, time) for spec, time in per_entry.items()}, rest=1e5)
    asked = options("speed_up", 1.5)
    inputs = compression_inputs(source, asked)
    plan = planner.decide_plan(inputs.source, asked, statistics=inputs.statistics, costs=costs)
    dense = 8 * matrix_parameters(source) + costs.rest
    spent = costs.rest + sum(
        per_entry[site.quant] * stored_parameters(source, replace(plan, sites=(site,))) for site in plan.sites
    )
    assert 1.5 <= dense / spent < 1.6
    # All in W8A8 would be faster than asked: the most sensitive matrices stay in floats.
    assert {site.quant for site in plan.sites} >= {None, W8A8}


@pytest.mark.whole
def test_a_whole_model_is_timed(source_of: SourceOf) -> None:
    source = source_of("llama", max_position_embeddings=1024)
    costs = model_costs(source, source, options("speed_up", 2), "decode", threads=1)
    assert costs.rest >= 0
    # INT4 is what a matrix gets that nothing is known of.
    assert set(costs.coefficients) == {*TIMED_FORMATS, QuantSpec(4, 32)}


def test_a_speed_up_needs_the_context_that_it_is_timed_on(llama: Path) -> None:
    with pytest.raises(InputError, match="shorter than the") as caught:
        check_options(open_source(llama), options("speed_up", 2))
    assert caught.value.where == "--speed-up"


# --- refusals


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"calibration": CalibrationOptions("none")}, "calibration.text"),
        ({"calibration": CalibrationOptions("gain")}, "calibration.text"),
        ({"kind": "speed_up", "value": 2, "ep": "cuda"}, "--speed-up"),
        ({"groups": ("moe",)}, "factorize.groups"),
    ],
)
def test_what_cannot_be_planned_is_refused_before_work(
    llama: Path, changes: dict[str, Any], where: str
) -> None:
    with pytest.raises(InputError) as caught:
        check_options(open_source(llama), options(**{"kind": "keep", "value": 0.9, **changes}))
    assert caught.value.where == where


def test_an_encoder_has_every_budget_but_that_of_time(source_of: SourceOf) -> None:
    bert = source_of("bert", max_position_embeddings=1024)
    for kind, amount in (("keep", 0.9), ("size", 500_000), ("mean_bits", 5)):
        check_options(bert, options(kind, amount))
    with pytest.raises(InputError, match="this is an encoder"):
        check_options(bert, options("speed_up", 1.5))


def test_a_budget_of_an_encoder_is_spent_by_the_error_of_its_states(source_of: SourceOf) -> None:
    bert = source_of("bert")
    losses = []
    for amount in (200_000, 240_000, 320_000):
        inputs = compression_inputs(bert, options("size", amount))
        plan = planner.decide_plan(
            inputs.source, inputs.recipe, statistics=inputs.statistics, table=inputs.table
        )
        assert {role for site in plan.sites for role in site.members} == {"q", "k", "v", "o", "up", "down"}
        assert amount > 300_000 or plan.table is not None
        losses.append(plan.predicted_loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 0


@pytest.mark.parametrize(
    "arguments",
    [("--set budget.phase=prefill",), ("--set quantize.activations=8", "--recipe", "int4"),
     ("--set quantize.activations=4", "--recipe", "int8"), ("--set calibration.text=corpus",), ("--size", "much"),
     ("--set prepare=[rotate]",)],
)  # fmt: skip
def test_arguments_that_do_not_go_together(
    cli: Cli, llama: Path, tmp_path: Path, arguments: tuple[object, ...]
) -> None:
    ended = cli("compress", llama, "-o", tmp_path / "out", *str(arguments[0]).split(), *arguments[1:])
    assert ended.code == 2
    assert f"\nrk-export: error: {arguments[0]}: " in f"\n{ended.err}"
    assert not (tmp_path / "out").exists()


# --- what surrounds a budget


@pytest.mark.whole
def test_healing_is_in_the_report_and_leaves_no_state(llama: Path, tmp_path: Path) -> None:
    asked = options("keep", 0.7, quant=None, table=None, methods=(HealOptions(steps=2),))
    report = compress(llama, tmp_path / "out", asked, run=Run(threads=1))
    assert any("heal" in finding.target for finding in report.findings)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    with pytest.raises(InputError, match="was healed"):
        verify(tmp_path / "out", llama)


def test_an_export_that_fails_keeps_the_state_of_the_healing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("rk_export.commands.compress.write_bundle", fail)
    asked = options("keep", 0.7, quant=None, table=None, methods=(HealOptions(steps=2),))
    with pytest.raises(OSError, match="disk full"):
        compress(llama, tmp_path / "out", asked, run=Run(threads=1))
    assert (tmp_path / ".out.work/heal.state").is_file()


@pytest.mark.whole
def test_w8a8_is_prepared_and_verified(llama: Path, tmp_path: Path) -> None:
    asked = made_recipe(quant=W8A8, calibration=TEXT)
    report = compress(llama, tmp_path / "out", asked, run=Run(threads=1))
    applied = {finding.target for finding in report.findings if finding.outcome == "applied"}
    tried = ("fold-attention", "fold-mlp", "rotate", "rotate-heads", "scale")
    assert {f"prepare.{name}" for name in tried} <= applied
    assert all(tier.passed for tier in report.parity if tier.bound is not None)


def test_prepare_writes_a_model_with_the_same_logits(cli: Cli, llama: Path, tmp_path: Path) -> None:
    ended = cli("prepare", llama, "-o", tmp_path / "out")
    assert ended.code == 0, ended.err
    ids = torch.arange(3, 40)[None]
    dense, prepared = (open_source(folder).load() for folder in (llama, tmp_path / "out"))
    expected, found = (model(input_ids=ids).logits for model in (dense, prepared))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not torch.equal(
        dense.model.layers[0].mlp.up_proj.weight, prepared.model.layers[0].mlp.up_proj.weight
    )
    assert cli("prepare", llama, "-o", tmp_path / "out").code == 2


@pytest.mark.whole
def test_moments_through_the_compressed_part(llama: Path, tmp_path: Path) -> None:
    files = {}
    for prefix in (False, True):
        out = tmp_path / str(prefix)
        asked = made_recipe(quant=QuantSpec(2, 16), calibration=replace(TEXT, prefix=prefix))
        report = compress(llama, out, asked, run=Run(threads=1))
        assert all(tier.passed for tier in report.parity if tier.bound is not None)
        files[prefix] = (out / "model.onnx.data").read_bytes()
    assert files[False] != files[True]
    (tiers,) = [{tier.tier: tier for tier in verify(tmp_path / "True", llama, run=Run(threads=1))}]
    assert tiers["g"].max_error == 0


@pytest.mark.whole
def test_a_file_beyond_the_budget_is_said_aloud(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rk_export.planning.budget_units.fixed_parts", lambda *_: ())
    report = compress(llama, tmp_path / "out", options("size", 150_000), run=Run(threads=1))
    assert any(notice.startswith("the files take") for notice in report.notices)


def test_an_encoder_says_what_stands_for_its_text(source_of: SourceOf) -> None:
    asked = made_recipe(groups=("qk",), quant=None, table=None, calibration=TEXT)
    inputs = compression_inputs(source_of("bert"), asked)
    (finding,) = inputs.findings
    assert (finding.target, finding.outcome) == ("calibration.text", "applied")
    assert "drawn uniformly" in finding.reason
    assert inputs.statistics is not None


def test_gradients_that_would_be_too_large_are_kept_by_their_diagonals(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rk_export.calibration.model_statistics.GRADIENT_LIMIT", 0)
    inputs = compression_inputs(open_source(llama), options("keep", 0.9, quant=None, table=None))
    assert inputs.statistics is not None
    assert {gradient.ndim for gradient in inputs.statistics.gradients.values()} == {1}
    assert [finding.target for finding in inputs.findings] == ["metric"]


def test_without_gradients_every_matrix_counts_by_its_relative_error(llama: Path) -> None:
    source = open_source(llama)
    asked = options("keep", 0.9, quant=None, table=None)
    asked = replace(asked, calibration=replace(TEXT, gradients=False))
    known = compression_inputs(source, asked).statistics
    assert known is not None
    model = source.load()
    for (layer, path), gradient in known.gradients.items():
        W, C = model.model.layers[layer].get_submodule(path).weight, known.second[layer, path]
        whole = 0.5 * known.tokens * float((gradient * ((W @ C) * W).sum(1)).sum())
        assert whole == pytest.approx(0.5, rel=1e-4)

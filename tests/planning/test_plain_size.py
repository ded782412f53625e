"""The size of plain INT4 is known from shapes alone, and it is the one of the files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_options
from made_recipes import open_recipe
from tiny_models import DECODERS, FAMILIES

from rk_export import compress
from rk_export.commands.checks import check_options
from rk_export.commands.compression_inputs import CompressionInputs, compression_inputs
from rk_export.device import CPU
from rk_export.graph.build import build_graph
from rk_export.model.sites import dense_sites
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.planning.budget import EmbeddingTable, spend
from rk_export.planning.budget_units import PLAIN_LAYERS, PLAIN_TABLES, budget_unit
from rk_export.planning.encoder_tables import with_encoder_table
from rk_export.planning.fixed_parts import graph_bytes
from rk_export.planning.plain_size import plain_int4_bytes, why_plain
from rk_export.planning.planner import decide_plan, embedding_weight
from rk_export.rewrite.apply import rewrite
from rk_export.rewrite.sizes import planned_bytes
from rk_export.source.stored import StoredModel

CONSTANTS = 600  # bytes of indices, axes and bounds that graph passes add
PLAIN = tiny_options(groups=(), rank=None)
SourceOf = Callable[..., StoredModel]


def plain(source: StoredModel, **options: Any) -> Recipe:
    """Return plain INT4; the token table of an encoder is no output projection."""
    recipe = tiny_options(groups=(), rank=None, **options)
    return with_encoder_table(recipe)[0] if source.architecture.is_encoder else recipe


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ep", ["cpu", "portable"])
def test_it_is_what_the_uniform_plan_takes(source_of: SourceOf, family: str, ep: str) -> None:
    source = source_of(family)
    recipe = plain(source, ep=ep)
    assert plain_int4_bytes(source, recipe) == planned_bytes(source, decide_plan(source, recipe)) + (
        graph_bytes(source.description)
    )


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_graph_stores(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    model, _ = build_graph(rewrite(source, decide_plan(source, plain(source))))
    values = [value.const_value for value in model.graph.initializers.values()]
    stored = sum(value.nbytes for value in values if value is not None)
    assert 0 <= stored - plain_int4_bytes(source, PLAIN) + graph_bytes(source.description) <= CONSTANTS


@pytest.mark.whole
def test_a_tied_table_counts_once_and_the_files_are_no_larger(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama", tie_word_embeddings=True)
    assert plain_int4_bytes(source, PLAIN) < plain_int4_bytes(source_of("llama"), PLAIN)
    compress(source.folder, tmp_path / "out", PLAIN, run=Run(threads=1))
    files = sum((tmp_path / "out" / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    expected = plain_int4_bytes(source, PLAIN)
    assert expected - graph_bytes(source.description) < files <= expected


@pytest.mark.slow
@pytest.mark.parametrize("family", DECODERS)
def test_its_bytes_are_spent_better(source_of: SourceOf, family: str) -> None:
    """Every family: no more bytes, no more predicted loss, one matrix a site."""
    source = source_of(family)
    size = plain_int4_bytes(source, Recipe())
    recipe = open_recipe(Budget("size", size), calibration=CalibrationOptions("self", tokens=512))
    check_options(source, recipe)
    inputs = compression_inputs(source, recipe)
    assert inputs.statistics is not None
    plan = decide_plan(inputs.source, inputs.recipe, statistics=inputs.statistics, table=inputs.table)
    assert planned_bytes(inputs.source, plan) + graph_bytes(source.description) <= size
    assert {site.form for site in plan.sites} == {"dense"}
    assert plan.predicted_loss is not None
    assert plan.predicted_loss <= plain_loss(inputs)


def plain_loss(inputs: CompressionInputs) -> float:
    """Return the predicted loss of plain INT4."""
    source, recipe = inputs.source, inputs.recipe
    unit = budget_unit(source, replace(recipe, budget=Budget("size", 1e9)), 1)
    unit = replace(unit, space=replace(unit.space, formats=(PLAIN_LAYERS,)), tables=(PLAIN_TABLES,))
    layers = (
        (layer, dense_sites(layer, source.description.projections(layer.index), recipe))
        for layer in source.layers()
    )
    assert inputs.statistics is not None
    assert inputs.table is not None
    table = EmbeddingTable(embedding_weight(source), inputs.table, source.description.table_count)
    return spend(layers, unit, inputs.statistics, table, CPU).predicted_loss


@pytest.mark.parametrize("family", DECODERS)
def test_every_decoder_spends_it_by_predicted_loss(source_of: SourceOf, family: str) -> None:
    assert why_plain(source_of(family), Recipe()) == ""


def test_what_keeps_a_model_plain_is_said(source_of: SourceOf) -> None:
    llama = source_of("llama")
    assert why_plain(source_of("bert"), Recipe()) == ""
    assert "calibration.text gain" in why_plain(llama, Recipe(calibration=CalibrationOptions("gain")))

"""Low rank plus sparse: the module, its graph, its checkpoint, its bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from compressed import INT4, OnnxModel, SourceOf, floats, logits, tokens
from hypothesis import given
from hypothesis import strategies as st
from sparse_plans import parts_of, sparse_plan
from tiny_models import DECODERS

from rk_export.errors import InputError
from rk_export.matrix_id import MatrixId
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.sparse_sites import sparse_decision
from rk_export.options.quantize import Quantize
from rk_export.options.recipe import Recipe
from rk_export.passes.modules.sparse import SparseSum
from rk_export.passes.numerics.gaps import encode_gaps
from rk_export.passes.numerics.low_rank_plus_sparse import Parts
from rk_export.plan import Plan, SitePlan
from rk_export.rewrite.apply import rewrite
from rk_export.rewrite.checkpoint import load_pretrained, save_pretrained
from rk_export.rewrite.sizes import planned_findings, size_summary
from rk_export.source.stored import StoredModel


@given(st.sets(st.integers(0, 5000), max_size=60))
def test_gaps_decode_to_the_places_and_padding_is_zero(places: set[int]) -> None:
    ascending = torch.tensor(sorted(places), dtype=torch.int32)
    values = torch.arange(1.0, len(places) + 1)
    gaps, padded = encode_gaps(ascending, values)
    found = gaps.long().cumsum(0)
    kept = padded != 0
    assert torch.equal(found[kept], ascending.long())
    assert torch.equal(padded[kept], values)
    assert len(set(found.tolist())) == len(found)


@pytest.mark.whole
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("rank", [0, 8])
def test_the_graph_computes_the_sum(source_of: SourceOf, tmp_path: Path, family: str, rank: int) -> None:
    source = source_of(family)
    plan, parts = sparse_plan(source, floats(), rank, 300)
    rewritten = rewrite(source, plan, parts=parts)
    ids = tokens(source)
    wanted = logits(rewritten.model, ids)
    exported = OnnxModel(rewritten, tmp_path)
    found, _ = exported.run(ids)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    sums = [module for module in rewritten.model.modules() if isinstance(module, SparseSum)]
    assert exported.fusion("sparse matrices").found == len(sums) == len(parts)


def test_the_sum_is_low_rank_plus_entries_in_half_precision(source_of: SourceOf) -> None:
    source = source_of("llama")
    plan, parts = sparse_plan(source, floats(), 4, 100)
    model = rewrite(source, plan, parts=parts).model
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    found = model.get_submodule("model.layers.1.mlp.up_proj")(x)
    own = parts[1, "mlp.up_proj"]
    wanted = x @ (own.up @ own.down + replace(own, values=own.values.half().float()).sparse()).T
    assert torch.allclose(found, wanted, atol=1e-5)


def test_biases_stay(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("qwen2")
    plan, parts = sparse_plan(source, floats(), 4, 100)
    rewritten = rewrite(source, plan, parts=parts)
    dense = source.load().get_submodule("model.layers.0.self_attn.q_proj")
    assert dense.bias is not None
    zero = torch.zeros(1, 1, 64)
    assert torch.equal(
        rewritten.model.get_submodule("model.layers.0.self_attn.q_proj")(zero)[0, 0], dense.bias
    )


@pytest.mark.whole
def test_factors_are_quantized_and_entries_are_not(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    plan, parts = sparse_plan(source, floats(quant=INT4), 32, 200)
    rewritten = rewrite(source, plan, parts=parts)
    ids = tokens(source)
    wanted = logits(rewritten.model, ids)
    exported = OnnxModel(rewritten, tmp_path)
    found, _ = exported.run(ids)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert exported.fusion("MatMulNBits").found == 2 * len(parts)


@pytest.mark.whole
def test_full_columns_are_a_dense_product_of_their_inputs(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    plan, parts = sparse_plan(source, floats(), 4, 0)
    place = (0, "self_attn.o_proj")
    W = source.load().get_submodule("model.layers.0.self_attn.o_proj").weight
    full = torch.zeros_like(W)
    full[:, [3, 17]] = W[:, [3, 17]]
    full[5, 40] = W[5, 40]
    flat = full.flatten()
    indices = flat.nonzero()[:, 0].int()
    parts[place] = replace(parts[place], indices=indices, values=flat[indices.long()])
    site = next(site for site in plan.sites if site.layer == 0 and site.members == ("o",))
    changed = replace(site, entries=len(indices))
    plan = replace(plan, sites=tuple(changed if item is site else item for item in plan.sites))
    rewritten = rewrite(source, plan, parts=parts)
    exported = OnnxModel(rewritten, tmp_path)
    gathers = [
        node
        for node in onnx.load(tmp_path / "model.onnx").graph.node
        if any(prop.value == "sparse_columns_o" for prop in node.metadata_props)
    ]
    assert len(gathers) == 1
    ids = tokens(source)
    wanted = logits(rewritten.model, ids)
    assert (exported.run(ids)[0] - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.whole
def test_the_file_holds_three_bytes_an_entry(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    sizes = []
    for entries in (500, 900):
        plan, parts = sparse_plan(source, floats(), 0, entries)
        folder = tmp_path / str(entries)
        folder.mkdir()
        OnnxModel(rewrite(source, plan, parts=parts), folder)
        sizes.append(sum(file.stat().st_size for file in folder.iterdir()))
    matrices = 14
    per_entry = (sizes[1] - sizes[0]) / (400 * matrices)
    assert 2.9 < per_entry < 3.3  # tensors are aligned in the file


def test_planned_bytes_are_those_of_the_model(source_of: SourceOf) -> None:
    source = source_of("llama")
    plan, parts = sparse_plan(source, floats(), 4, 300)
    rewritten = rewrite(source, plan, parts=parts)
    planned = {item.target: item.bytes_after for item in planned_findings(source, plan)}
    done = {item.target: item.bytes_after for item in rewritten.findings if item.target in planned}
    assert done == {name: planned[name] for name in done}
    assert len(done) == len(parts)
    summary = size_summary(source, rewritten, None)
    dense_rest = summary.dense_parameters - sum(64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 128 for _ in range(2))
    kept = sum(item.parameters for item in parts.values())
    assert summary.kept_parameters == dense_rest + kept
    entries = sum(item.entries for item in parts.values())
    assert summary.compressed_bytes == 4 * (summary.kept_parameters - entries) + 3 * entries


def test_a_checkpoint_keeps_both_parts(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    plan, parts = sparse_plan(source, floats(quant=INT4), 32, 200)
    rewritten = rewrite(source, plan, parts=parts)
    save_pretrained(rewritten, tmp_path / "saved", tokenizer_from=source.folder)
    again = load_pretrained(tmp_path / "saved")
    ids = tokens(source)
    assert torch.equal(logits(again.model, ids), logits(rewritten.model, ids))


@pytest.mark.whole
def test_nothing_left_of_a_matrix_is_zero_in_both(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    plan, parts = sparse_plan(source, floats(), 0, 0)
    rewritten = rewrite(source, plan, parts=parts)
    ids = tokens(source)
    found, _ = OnnxModel(rewritten, tmp_path).run(ids)
    assert torch.allclose(found, logits(rewritten.model, ids), atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "joint", "rank": 4, "entries": 3}, "do not fit the form"),
        ({"form": "sparse", "rank": 0, "quant": INT4}, "no factors to quantize"),
        ({"form": "sparse", "members": ("q", "k"), "paths": ("a", "b")}, "2 members"),
        ({"form": "sparse", "entries": -1}, "-1 sparse entries"),
    ],
)
def test_sites_that_contradict_themselves_are_refused(changes: dict[str, object], message: str) -> None:
    fields = {"site": "layers.0.q", "layer": 0, "members": ("q",), "paths": ("a",), "rank": 0, "quant": None}
    with pytest.raises(InputError, match=message):
        SitePlan(**{**fields, **changes})  # type: ignore[arg-type]


def test_plans_with_sparse_sites_survive_json(source_of: SourceOf) -> None:
    plan, _ = sparse_plan(source_of("llama"), floats(), 4, 10)
    assert Plan.from_json(plan.to_json()) == plan


def test_parts_of_is_what_the_tests_believe() -> None:
    W = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(parts_of(W, 2, 30).dense(), W, atol=1e-6)


def sparse_plan_of(source: StoredModel, recipe: Recipe, parts: Mapping[MatrixId, Parts]) -> Plan:
    return sparse_decision(source, recipe, parts).plan(source, recipe)


def test_what_cannot_be_quantized_is_said(source_of: SourceOf) -> None:
    source = source_of("llama")
    _, parts = sparse_plan(source, floats(), 0, 50)
    plans = [sparse_plan_of(source, Recipe((CapOptions(keep=0.5),)), parts)]
    plans.append(sparse_plan_of(source, plans[0].recipe.with_step(Quantize(bits=8)), parts))
    reasons = [{site.reason for site in plan.sites} for plan in plans]
    assert reasons == [{""}, {"no direction was chosen: entries are not quantized further"}]
    assert {site.quant for site in plans[1].sites} == {None}

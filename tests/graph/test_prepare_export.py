"""Prepared models through quantization, checkpoints and the exported graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed import INT4, OnnxModel, SourceOf, floats, logits, tokens
from safetensors.torch import load_file, save_file
from torch import nn

from rk_export.errors import InputError
from rk_export.graph.build import build_graph
from rk_export.model.layer_wiring import wiring_of
from rk_export.options.prepare import PREPARATIONS
from rk_export.options.quantization import QuantSpec
from rk_export.options.ranks import RankRule
from rk_export.options.recipe import Recipe
from rk_export.options.target import Target
from rk_export.passes.graph.nodes import PART_KEY, SITE_KEY
from rk_export.passes.modules.quantized import QuantizedEmbedding, QuantizedLinear, RotatedHead
from rk_export.planning.planner import decide_plan
from rk_export.report.records import Outcome
from rk_export.rewrite.apply import QUANTIZED, Rewritten, rewrite
from rk_export.rewrite.checkpoint import load_pretrained, save_pretrained
from rk_export.source.prepared import Prepared
from rk_export.source.stored import StoredModel
from rk_export.source.transformed import Transformed

BOUND = 1e-4
INT8 = QuantSpec(8, 16)
OPTIONS = {
    "float": floats(prepare=PREPARATIONS),
    "int8": floats(prepare=PREPARATIONS, quant=INT8, table=INT8),
    "int4": floats(("qk",), prepare=PREPARATIONS, rank=RankRule("rank", 8), quant=INT4, table=INT4),
    "asymmetric": floats(prepare=PREPARATIONS, quant=INT4, table=QuantSpec(8, 32, symmetric=False)),
}
CASES = [(form, tied) for form in OPTIONS for tied in (True, False)]


def prepared(source: StoredModel) -> Transformed:
    config, generator = source.config, torch.Generator().manual_seed(2)
    width = config.ffn_dim if config.model_type == "opt" else config.intermediate_size
    names = [
        f"layers.{index}.{down}"
        for index in range(source.layer_count)
        for _, down in wiring_of(source.description, index).mlps
    ]
    peaks = {name: torch.rand(width, generator=generator).mul(20) for name in names}
    return source.then(Prepared(source.description, PREPARATIONS, peaks=peaks))


def rewritten_of(source: StoredModel, recipe: Recipe, **extra: Any) -> Rewritten:
    new = prepared(source)
    return rewrite(new, decide_plan(new, recipe), **extra)


@pytest.mark.whole
@pytest.mark.parametrize(("form", "tied"), CASES)
def test_the_graph_equals_pytorch(source_of: SourceOf, tmp_path: Path, form: str, tied: bool) -> None:
    source = source_of("llama", tie_word_embeddings=tied)
    rewritten = rewritten_of(source, OPTIONS[form])
    assert isinstance(rewritten.model.get_submodule("lm_head"), RotatedHead) is tied
    ids = tokens(source)
    onnx = OnnxModel(rewritten, tmp_path)
    expected = logits(rewritten.model, ids)
    actual, _ = onnx.run(ids)
    assert float((actual - expected).abs().max()) <= BOUND * float(expected.abs().max())
    quantized = sum(isinstance(module, QuantizedLinear) for module in rewritten.model.modules())
    assert onnx.fusion("MatMulNBits").found == quantized
    _, past = onnx.run(ids[:, :8])
    rest, _ = onnx.run(ids[:1, 8:], torch.ones(1, 12, dtype=torch.int64), {k: v[:1] for k, v in past.items()})
    assert float((rest - expected[:1, 8:]).abs().max()) <= BOUND * float(expected.abs().max())
    if form == "float":
        dense = logits(source.load(), ids)
        assert float((actual - dense).abs().max()) <= BOUND * float(dense.abs().max())


@pytest.mark.whole
@pytest.mark.parametrize("form", ["float", "int8"])
def test_the_tied_table_is_stored_once_and_the_rotation_runs_on_the_last_rows(
    source_of: SourceOf, tmp_path: Path, form: str
) -> None:
    source = source_of("llama", tie_word_embeddings=True)
    graph, _ = build_graph(rewritten_of(source, OPTIONS[form]))
    vocabulary, size = source.config.vocab_size, source.config.hidden_size
    shapes = [tuple(value.shape.numpy()) for value in graph.graph.initializers.values()]
    assert [shape[:1] for shape in shapes].count((vocabulary,)) == (
        1 if form == "float" else 2
    )  # codes, scales
    marked = [node for node in graph.graph if node.metadata_props.get(SITE_KEY) == "lm_head"]
    assert [node.metadata_props[PART_KEY] for node in marked] == ["rotation", "lm_head"]
    assert marked[0].inputs[0].producer().op_type == "Slice"
    assert marked[1].inputs[0] is marked[0].outputs[0]
    assert marked[0].outputs[0].shape[-1] == size
    onnx = OnnxModel(rewritten_of(source, OPTIONS[form]), tmp_path)
    ids = tokens(source)
    whole, _ = onnx.run(ids)
    last, _ = onnx.run(ids, logits_start=np.array([-1], dtype=np.int64))
    assert last.shape[1] == 1
    torch.testing.assert_close(last[:, 0], whole[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize("form", ["float", "int8"])
def test_half_precision_graphs_take_the_rotation(source_of: SourceOf, tmp_path: Path, form: str) -> None:
    source = source_of("llama", tie_word_embeddings=True)
    rewritten = rewritten_of(source, replace(OPTIONS[form], target=Target("portable", 0)))
    ids = tokens(source)
    expected = logits(rewritten.model, ids)
    actual, _ = OnnxModel(rewritten, tmp_path).run(ids)
    assert float((actual.float() - expected).abs().max()) <= 2e-2 * float(expected.abs().max())


@pytest.mark.whole
@pytest.mark.parametrize("family", ["qwen3", "granite", "mixtral", "gemma3", "opt"])
def test_other_families_export_too(source_of: SourceOf, tmp_path: Path, family: str) -> None:
    source = source_of(family, tie_word_embeddings=True)
    new = prepared(source)
    rewritten = rewrite(new, decide_plan(new, floats(prepare=new.transforms[0].names)))
    ids = tokens(source)
    dense = logits(source.load(), ids)
    actual, _ = OnnxModel(rewritten, tmp_path).run(ids)
    assert float((actual - dense).abs().max()) <= BOUND * float(dense.abs().max())


def test_the_rotation_is_quantized_to_eight_bits_beside_the_table(source_of: SourceOf) -> None:
    source = source_of("llama", tie_word_embeddings=True)
    rewritten = rewritten_of(source, OPTIONS["int4"])
    head, table = (rewritten.model.get_submodule(path) for path in ("lm_head", "model.embed_tokens"))
    assert isinstance(head, RotatedHead)
    assert isinstance(table, QuantizedEmbedding)
    assert isinstance(head.rotation, QuantizedLinear)
    assert isinstance(head.head, QuantizedLinear)
    assert (head.rotation.spec, head.head.spec) == (INT8, INT4)
    assert head.head.codes is table.codes
    finding = next(item for item in rewritten.findings if item.target == "lm_head.rotation")
    assert finding.outcome is Outcome.APPLIED
    assert (finding.bytes_before, finding.bytes_after) == (64 * 64 * 4, 64 * 64 + 64 * 4 * 2)
    assert finding.error is not None
    assert 0 < finding.error < 0.02


def test_the_probe_of_a_prepared_model_has_the_dense_logits(source_of: SourceOf) -> None:
    source = source_of("llama", tie_word_embeddings=True)
    probe = tokens(source)
    rewritten = rewritten_of(source, OPTIONS["int8"], probe=probe)
    dense, found = logits(source.load(), probe), rewritten.probe_logits
    assert float((found["dense"] - dense).abs().max()) <= BOUND * float(dense.abs().max())
    torch.testing.assert_close(found[QUANTIZED], logits(rewritten.model, probe))
    assert 0 < float((found[QUANTIZED] - dense).norm() / dense.norm()) < 0.1


@pytest.mark.whole
@pytest.mark.parametrize(("form", "tied"), CASES)
def test_checkpoints_come_back(source_of: SourceOf, tmp_path: Path, form: str, tied: bool) -> None:
    source = source_of("llama", tie_word_embeddings=tied)
    rewritten = rewritten_of(source, OPTIONS[form])
    save_pretrained(rewritten, tmp_path / "out", tokenizer_from=source.folder)
    loaded = load_pretrained(tmp_path / "out")
    ids = tokens(source)
    assert torch.equal(logits(loaded.model, ids), logits(rewritten.model, ids))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert any(name.startswith("lm_head.rotation.") for name in stored) is tied
    assert (
        any(name.startswith(("lm_head.head.", "lm_head.weight", "lm_head.codes")) for name in stored)
        is not tied
    )
    head: Any = loaded.model.get_submodule("lm_head")
    if tied and form == "float":
        assert isinstance(head.head, nn.Linear)
        assert head.head.weight is loaded.model.get_submodule("model.embed_tokens").weight
    expected, actual = (
        {name: value.const_value for name, value in build_graph(item)[0].graph.initializers.items()}
        for item in (rewritten, loaded)
    )
    assert expected.keys() == actual.keys()
    for name in expected:
        np.testing.assert_array_equal(actual[name].numpy(), expected[name].numpy(), err_msg=name)


def test_a_checkpoint_without_its_rotation_is_refused(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama", tie_word_embeddings=True)
    save_pretrained(rewritten_of(source, OPTIONS["float"]), tmp_path / "out", tokenizer_from=source.folder)
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    del stored["lm_head.rotation.weight"]
    save_file(stored, path)
    with pytest.raises(InputError, match=r"'lm_head.rotation.weight' is missing"):
        load_pretrained(tmp_path / "out")


def test_a_plan_that_rotates_without_folding_is_refused(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama", tie_word_embeddings=True)
    save_pretrained(rewritten_of(source, OPTIONS["float"]), tmp_path / "out", tokenizer_from=source.folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["rk_export"]["plan"]["recipe"]["steps"] = [{"prepare": ["rotate"]}]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="add fold"):
        load_pretrained(tmp_path / "out")

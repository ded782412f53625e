"""Every family under everything that can be asked for: exact, or refused with a reason.

A compressed graph computes what the compressed model computes in PyTorch. A preparation leaves the logits of the
untouched model. What a family does not take is refused before any work, or left out with a reason.

A normal run takes a sixth of the families, each under one method and one preparation in turn; `make families` takes
all.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from compressed import OnnxModel, level_0, logits
from conftest import SENTENCES, VOCABULARY, trained_tokenizer
from exactness import BOUND, distance, rounding, untouched, words
from family_methods import PREPARED, RECIPES, carried_out, prepared
from family_runs import families, in_turn, record, sampled
from tiny_models import family_of, tiny_model

from rk_export.errors import RkExportError
from rk_export.parity.comparison import FLOAT_BOUND
from rk_export.passes.modules.quantized import float_inputs
from rk_export.source.stored import StoredModel, open_source

pytestmark = pytest.mark.whole

MODELS = sampled(families(), 6)
# Every model has matrices to factorize and to quantize; a mixture's experts are read too seldom for some.
NEVER_REFUSED = ("rank", "identity", "INT4", "rank and INT4", "W8A8", "prune blocks", "CAP", "SSLC")
# They need a next token, or know the blocks of decoders alone.
NOT_FOR_ENCODERS = ("prune blocks", "prune neurons", "prune heads", "CAP", "Basel", "SSLC")
NOT_FOR_MIXTURES = ("CAP", "SSLC", "Basel", "prune blocks")
# A prepared model may be so many times as far from the untouched one as its float32 is from its float64.
ROUNDING = 8.0


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are gathered by the code under test, not found."""
    monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / "cache")


def saved(name: str, folder: Path) -> StoredModel:
    """Return a family's tiny model with a tokenizer."""
    tiny_model(name, vocab_size=VOCABULARY).save_pretrained(folder)
    trained_tokenizer().save_pretrained(folder)
    return open_source(folder)


@pytest.mark.parametrize(("name", "method"), in_turn(MODELS, tuple(RECIPES)))
def test_a_compressed_graph_equals_the_compressed_model(name: str, method: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path)
    text = tmp_path / "task.txt"
    text.write_text("\n".join(SENTENCES * 4), "utf-8")
    try:
        rewritten = carried_out(source, RECIPES[method](text))
    except RkExportError as error:
        may_refuse = method not in NEVER_REFUSED
        if family_of(name).is_encoder:
            may_refuse = method in NOT_FOR_ENCODERS and "encoder" in error.what
        elif method in NOT_FOR_MIXTURES and source.description.decoder.experts is not None:
            may_refuse = True
        if not may_refuse:
            raise
        record(name, f"method {method}", {"refused": error.what})
        return
    assert not (family_of(name).is_encoder and method in NOT_FOR_ENCODERS)
    ids = words(2, 16, vocabulary=VOCABULARY)
    graph = OnnxModel(rewritten, tmp_path)
    with float_inputs(rewritten.model):
        expected = logits(rewritten.model, ids)
    error = distance(level_0(graph, ids) if method == "W8A8" else graph.run(ids)[0], expected)
    changed = distance(expected, logits(untouched(name, tmp_path), ids))
    assert error <= FLOAT_BOUND["fp32"]
    assert changed > error, "nothing was compressed"
    record(name, f"method {method}", {"error": error, "changed": changed})


@pytest.mark.parametrize(("name", "preparation"), in_turn(MODELS, tuple(PREPARED)))
def test_a_prepared_graph_equals_the_untouched_model(name: str, preparation: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path)
    rewritten, left_out = prepared(source, PREPARED[preparation])
    ids, model = words(2, 16, vocabulary=VOCABULARY), untouched(name, tmp_path)
    error = distance(OnnxModel(rewritten, tmp_path).run(ids)[0], logits(model, ids))
    assert all(left_out.values()), f"left out without a reason: {left_out}"
    assert error <= max(BOUND, ROUNDING * rounding(model, ids))
    record(name, f"preparation {preparation}", {"error": error, "left out": left_out})

"""Every family against the untouched model as transformers loads it: graph, engine, GenAI, half precision.

`make families` runs all; without it the graphs of all families are compared and the bundles of a sample.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bundle_tokens import answers, answers_error
from compressed import OnnxFile, OnnxModel, floats, logits
from compressed import compress as rewritten_of
from exactness import BOUND, decoder_errors, distance, encoder_errors, untouched, words
from family_runs import families, record, sampled
from genai_tokens import genai_tokens
from tiny_models import family_of, tiny_model

from rk_export import compress
from rk_export.model.computed_in import computing_in
from rk_export.options.run import Run
from rk_export.parity.comparison import FLOAT_BOUND
from rk_export.parity.tiers import OWN_PRECISION_FACTOR
from rk_export.source.stored import open_source

pytestmark = pytest.mark.whole

MODELS = families()
DECODERS = [name for name in MODELS if not family_of(name).is_encoder]
NEW_TOKENS, GENAI_TOKENS = 64, 40
EOS = 2


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    model = untouched(name, tmp_path)
    graph = OnnxModel(rewritten_of(open_source(tmp_path), floats()), tmp_path)
    errors = (encoder_errors if family_of(name).is_encoder else decoder_errors)(graph, model)
    assert max(errors.values()) <= BOUND, errors
    record(name, "parity", errors)


@pytest.mark.parametrize("name", sampled(MODELS, 10))
def test_half_precision_stays_in_its_bound(name: str, tmp_path: Path) -> None:
    """The common bound, or twice what PyTorch's own half precision loses.

    A router that is near a tie falls to either side in half precision, and the token then goes to another expert. So
    of a mixture the bound holds for most positions.
    """
    tiny_model(name).save_pretrained(tmp_path)
    source, model, ids = open_source(tmp_path), untouched(name, tmp_path), words(2, 24)
    graph = OnnxModel(rewritten_of(source, floats(ep="portable")), tmp_path)
    expected = logits(model, ids)
    with computing_in(model, torch.float16):
        half = logits(model, ids)
    found = graph.run(ids)[0]
    if not family_of(name).is_encoder and source.description.decoder.experts is not None:
        differences = (found - expected).abs().amax(-1).flatten()
        held = differences <= differences.median()
        found, half, expected = (values.flatten(0, 1)[held] for values in (found, half, expected))
    own, error = distance(half, expected), distance(found, expected)
    assert error <= max(FLOAT_BOUND["fp16"], OWN_PRECISION_FACTOR * own)
    record(name, "half precision", {"error": error, "PyTorch's own": own})


@pytest.mark.parametrize("name", sampled(DECODERS, 16))
def test_a_bundle_gives_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    """64 greedy tokens of requests in slots, their logits, and the tokens in GenAI."""
    tiny_model(name).save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", tmp_path / "out", floats(), run=Run(threads=1))
    model = untouched(name, tmp_path / "model")
    errors = decoder_errors(OnnxFile(tmp_path / "out"), model)
    rows = answers(tmp_path / "out", [words(1, length, seed=length)[0] for length in (5, 11, 17)], NEW_TOKENS)
    errors["slots"], same = answers_error(model, rows)
    assert same == NEW_TOKENS * len(rows)
    assert max(errors.values()) <= BOUND, errors
    record(name, "bundle", {"errors": errors, "greedy tokens": NEW_TOKENS * len(rows), "equal": same})
    wanted = [row.until(EOS, GENAI_TOKENS) for row in rows]
    assert genai_tokens(tmp_path / "out", [row.prompt for row in rows], GENAI_TOKENS) == wanted
    record(name, "genai", {"tokens": sum(map(len, wanted))})

"""The tests of families find what they are for: a field that is not read, a refusal without a name, a wrong fold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from compressed import OnnxModel, compress, floats, logits
from config_changes import Change, changes
from config_walk import EXACT, REFUSED, WITHOUT_EFFECT, Walk
from exactness import BOUND, decoder_errors, distance, untouched, words
from tiny_models import tiny_config, tiny_model
from transformers import PretrainedConfig

from rk_export.errors import UnsupportedModelError
from rk_export.model.decoder_spec import DecoderSpec
from rk_export.model.families.registry import FAMILIES
from rk_export.planning.planner import decide_plan
from rk_export.rewrite.apply import rewrite
from rk_export.source.prepared import Prepared
from rk_export.source.stored import open_source

pytestmark = pytest.mark.whole

MULTIPLIER = Change("residual_multiplier", "residual_multiplier", 0.9, 0.9)
Patched = Callable[[Callable[[PretrainedConfig], DecoderSpec]], None]


@pytest.fixture
def granite_as(monkeypatch: pytest.MonkeyPatch) -> Patched:
    """Return a function that has Granite's configs read in another way."""

    def patch(decoder: Callable[[PretrainedConfig], DecoderSpec]) -> None:
        monkeypatch.setitem(FAMILIES, "granite", replace(FAMILIES["granite"], decoder=decoder))

    return patch


_GRANITE = FAMILIES["granite"].decoder


def read(config: PretrainedConfig) -> DecoderSpec:
    assert _GRANITE is not None
    return _GRANITE(config)


def test_a_field_that_is_read_is_exact(tmp_path: Path) -> None:
    walk = Walk("granite", tmp_path)
    assert walk.outcome(MULTIPLIER) == (EXACT, "")
    assert walk.outcome(Change("use_cache", "use_cache", False, False)) == (WITHOUT_EFFECT, "")
    assert walk.outcome(Change("hidden_act", "hidden_act", "mish", "mish"))[0] == REFUSED


def test_a_field_that_is_not_read_is_found(granite_as: Patched, tmp_path: Path) -> None:
    granite_as(lambda config: replace(read(config), residual_scale=0.6))
    with pytest.raises(AssertionError, match="the graph computes other logits"):
        Walk("granite", tmp_path).outcome(MULTIPLIER)


def test_a_field_that_transformers_does_not_read_is_found(granite_as: Patched, tmp_path: Path) -> None:
    granite_as(lambda config: replace(read(config), logit_softcap=float(not config.use_cache)))
    with pytest.raises(AssertionError, match="the graph computes other logits"):
        Walk("granite", tmp_path).outcome(Change("use_cache", "use_cache", False, False))


def test_a_refusal_without_the_name_is_found(granite_as: Patched, tmp_path: Path) -> None:
    walk = Walk("granite", tmp_path)

    def refuse(config: PretrainedConfig) -> DecoderSpec:
        raise UnsupportedModelError("an option of it is not known", where="config.json")

    granite_as(refuse)
    with pytest.raises(AssertionError, match="refused without naming the field"):
        walk.outcome(MULTIPLIER)


def test_a_dropped_flag_is_found(granite_as: Patched, tmp_path: Path) -> None:
    granite_as(lambda config: replace(read(config), residual_scale=1.0))
    tiny_model("granite").save_pretrained(tmp_path)
    graph = OnnxModel(compress(open_source(tmp_path), floats()), tmp_path)
    assert decoder_errors(graph, untouched("granite", tmp_path))["prefill"] > 100 * BOUND


def test_a_preparation_that_is_not_exact_is_found(tmp_path: Path) -> None:
    """Gemma's gains are stored minus one; a fold that does not know it."""
    tiny_model("gemma2").save_pretrained(tmp_path)
    source = open_source(tmp_path)
    wrong = replace(
        source.description, architecture=replace(source.description.architecture, unit_offset=False)
    )
    new = source.then(Prepared(wrong, ("fold",)))
    graph = OnnxModel(rewrite(new, decide_plan(new, floats(prepare=("fold",)))), tmp_path)
    ids = words(2, 12)
    assert distance(graph.run(ids)[0], logits(untouched("gemma2", tmp_path), ids)) > 100 * BOUND


def test_every_declared_field_is_walked() -> None:
    config = tiny_config("gemma3")
    walked = {change.field for change in changes(config, tiny_model("gemma3"))}
    assert {"attn_logit_softcapping", "rope_parameters", "layer_types", "hidden_activation"} <= walked
    places = {change.place for change in changes(config, tiny_model("gemma3"))}
    assert "rope_parameters.sliding_attention.rope_theta" in places

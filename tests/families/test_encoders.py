"""Encoders and classifiers: each value of their spec is seen, and classifiers compute what transformers' classes do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from classifiers import SEQUENCE, TOKENS, saved_classifier
from compressed import OnnxModel, compress, floats
from encoder_flags import Flag, flags
from exactness import BOUND, encoder_errors, prefill_error, untouched
from family_runs import families, record, sampled
from tiny_models import family_of, tiny_config, tiny_model
from transformers import PreTrainedModel

from rk_export.errors import RkExportError
from rk_export.model.description import describe
from rk_export.source.stored import StoredModel, open_source

pytestmark = pytest.mark.whole

BROKEN = 100 * BOUND
ENCODERS = [name for name in families() if family_of(name).is_encoder]
CLASSIFIED = [name for name in ENCODERS if family_of(name).model_type not in ("gemma3_text", "qwen3")]
HEADS = [SEQUENCE, TOKENS]


def found_without(flag: Flag, source: StoredModel, model: PreTrainedModel, folder: Path) -> float | str:
    """Return how far the graph without a flag is from transformers, or what says that it is another model's."""
    kept = source.description.encoder
    vars(source.description)["encoder"] = flag.without
    try:
        graph = OnnxModel(compress(source, floats()), folder)
        return max(prefill_error(graph, model), *encoder_errors(graph, model).values())
    except RkExportError as error:
        return error.what
    except AttributeError as error:  # a family without rotation has no module that says how to rotate
        if "has no attribute" not in str(error):
            raise
        return str(error)
    finally:
        vars(source.description)["encoder"] = kept


def unseen(source: StoredModel, model: PreTrainedModel, folder: Path) -> dict[str, float | str]:
    found = {
        flag.place: found_without(flag, source, model, folder) for flag in flags(source.description.encoder)
    }
    assert found
    return {place: error for place, error in found.items() if isinstance(error, float) and error < BROKEN}


@pytest.mark.parametrize("name", sampled(ENCODERS, 5))
def test_each_flag_of_an_encoder_is_seen(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    assert not unseen(open_source(tmp_path), untouched(name, tmp_path), tmp_path)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", sampled(CLASSIFIED, 3))
def test_a_classifier_computes_what_transformers_computes(name: str, head: str, tmp_path: Path) -> None:
    model = saved_classifier(name, head, tmp_path)
    graph = OnnxModel(compress(open_source(tmp_path), floats()), tmp_path)
    errors = encoder_errors(graph, model)
    record(name, f"classifier of {head}", errors)
    assert max(errors.values()) <= BOUND, errors


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", sampled(("bert", "distilbert", "modernbert", "eurobert"), 3))
def test_each_flag_of_a_classifier_is_seen(name: str, head: str, tmp_path: Path) -> None:
    model = saved_classifier(name, head, tmp_path)
    source = open_source(tmp_path)
    assert source.description.encoder.classifier is not None
    assert not unseen(source, model, tmp_path)


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_every_pooling_of_a_classifier(pooling: str, tmp_path: Path) -> None:
    model = saved_classifier("eurobert", SEQUENCE, tmp_path, classifier_pooling=pooling)
    graph = OnnxModel(compress(open_source(tmp_path), floats()), tmp_path)
    assert max(encoder_errors(graph, model).values()) <= BOUND


def test_flags_are_found() -> None:
    found = {flag.place for flag in flags(describe(tiny_config("modernbert")).encoder)}
    wanted = {"layers.reach", "layers.rotary by layer", "layers.attention_norm", "gated_mlp", "final_norm"}
    assert wanted <= found
    assert {"relative_buckets", "positions.padding"} <= {
        flag.place for flag in flags(describe(tiny_config("mpnet")).encoder)
    }
    assert {field.name for field in dataclasses.fields(describe(tiny_config("bert")).encoder)} >= {"causal"}

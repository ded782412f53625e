"""Bundles in JavaScript: onnxruntime-node and transformers.js under Node, against our own runtime.

Runs with ``make test-node``, which installs the packages of ``package.json`` beside the project. The model is a tiny
one; RK_BUNDLE may name the bundle of a chat model that is then tried too.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if "RK_NODE_MODULES" not in os.environ:
    pytest.skip("needs packages of Node.js: run `make test-node`", allow_module_level=True)

from conftest import SENTENCES, VOCABULARY, tiny_options, trained_tokenizer
from made_recipes import INT8
from node_scripts import node
from plain_loop import Greedy, empty_cache, greedy, opened
from tiny_models import tiny_model

from rk_export import Recipe, Run, compress, deployment_files
from rk_export.bundle.targets.js_graph import KEPT
from rk_export.bundle.targets.transformers_js import ENCODER_TYPES, MODEL_TYPES
from rk_export.options.quantization import QuantSpec
from rk_export.runtime import EncoderSession, GenerationOptions, Session

pytestmark = pytest.mark.whole

NEW_TOKENS = 24
OPTIONS = GenerationOptions(max_new_tokens=NEW_TOKENS)
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "Where is the Eiffel Tower?"},
]
RECIPES: dict[str, dict[str, Any]] = {
    "q4": {},
    "q4f16": {"ep": "portable"},
    "q8": {"quant": INT8},
    "q8 with 8-bit activations": {"quant": QuantSpec(8, 0, activations=8)},
    "fp32": {"quant": None, "table": None, "accuracy_level": 0},
    "fp16": {"quant": None, "table": None, "accuracy_level": 0, "ep": "portable"},
    "exact q4": {"accuracy_level": 0},
}
FormatOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def format_of(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> FormatOf:
    """Return a function from a name in RECIPES to a bundle with its folder for transformers.js, made once."""
    made: dict[str, Path] = {}

    def bundle(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("formats") / "bundle"
            compress(llama, made[name], tiny_options(**RECIPES[name]), run=Run(threads=1))
            deployment_files(made[name], ["transformers.js"])
        return made[name]

    return bundle


@pytest.fixture(scope="module")
def session(format_of: FormatOf) -> Session:
    return Session.from_pretrained(format_of("q4"), provider="cpu", threads=1)


def python_logits(model: Path, ids: np.ndarray) -> np.ndarray:
    """Return the first output of a graph for an empty cache."""
    session = opened(model)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **empty_cache(session, len(ids))}
    logits: np.ndarray = session.run(None, feeds)[0]
    return logits


def plainly(session: Session, prompt: list[int]) -> Greedy:
    """Continue a prompt in plain ONNX Runtime; our runtime must agree with it.

    Where a product reads floats, our runtime runs more rows than one for the same bits in every batch, so two tokens
    that are as good as equal may change places.
    """
    found = greedy(session.config.model_path, prompt, NEW_TOKENS, session.config.eos_ids)
    (own,) = session.generate([prompt], options=OPTIONS)
    assert found.agrees(own.token_ids)
    return found


def node_logits(model: Path, ids: np.ndarray, dtype: Any, kept: int | None) -> np.ndarray:
    found = node("logits.mjs", model=str(model), ids=ids.tolist(), kept=kept)
    return np.frombuffer(base64.b64decode(found["data"]), dtype).reshape(found["dims"])


@pytest.mark.parametrize("name", RECIPES)
def test_logits_of_node_equal_those_of_python(format_of: FormatOf, name: str) -> None:
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 17))
    bundle = format_of(name)
    expected = python_logits(bundle / "model.onnx", ids)
    (served,) = (bundle / "transformers.js" / "onnx").glob("*.onnx")
    for model, kept in ((bundle / "model.onnx", None), (served, 0)):
        np.testing.assert_array_equal(node_logits(model, ids, expected.dtype, kept), expected)
    for kept in (1, 3):
        last = node_logits(served, ids, expected.dtype, kept)
        assert last.shape[1] == kept
        # A product of few rows may be added up in another order than one of many.
        bound = (1e-5 if expected.dtype == np.float32 else 1e-2) * np.abs(expected).max()
        np.testing.assert_allclose(last, expected[:, -kept:], rtol=0, atol=bound)


def test_the_graph_asks_for_what_transformers_js_feeds(format_of: FormatOf) -> None:
    (served,) = (format_of("q4") / "transformers.js" / "onnx").glob("*.onnx")
    found = node("logits.mjs", model=str(served), ids=[[5, 6, 7]], kept=0)
    assert KEPT in found["names"]
    assert "logits_start" not in found["names"]


def test_transformers_js_has_a_class_for_every_family_that_is_let_through() -> None:
    decoders = sorted(MODEL_TYPES)
    found = node("transformers.mjs", folder=str(Path(__file__)), task="types", types=[*decoders, "mixtral"])
    assert found["known"] == decoders
    encoders = sorted(ENCODER_TYPES)
    given = {"task": "types", "types": [*encoders, "internlm3"], "encoders": True}
    assert node("transformers.mjs", folder=str(Path(__file__)), **given)["known"] == encoders


def assert_continued(session: Session, folder: str, prompt: str) -> Greedy:
    """Compare the tokens and the text of transformers.js with those of the plain loop."""
    ids = session.text_codec.encode(prompt)
    expected = plainly(session, ids)
    found = node("transformers.mjs", folder=folder, task="tokens", prompt=prompt, new_tokens=NEW_TOKENS)
    assert found["ids"] == [*ids, *expected.tokens]
    assert found["text"] == session.text_codec.decode(expected.tokens)
    return expected


@pytest.mark.parametrize("name", RECIPES)
def test_greedy_tokens_and_text(format_of: FormatOf, name: str) -> None:
    bundle = format_of(name)
    session = Session.from_pretrained(bundle, provider="cpu", threads=1)
    folder = str(bundle / "transformers.js")
    for prompt in SENTENCES[:2]:
        assert_continued(session, folder, prompt)


def test_chat(format_of: FormatOf, session: Session) -> None:
    folder = str(format_of("q4") / "transformers.js")
    assert_answered(session, folder)


def assert_answered(session: Session, folder: str) -> None:
    found = node("transformers.mjs", folder=folder, task="chat", messages=MESSAGES, new_tokens=NEW_TOKENS)
    expected = plainly(session, session.chat_tokens(MESSAGES))
    assert found["content"] == session.text_codec.decode(expected.tokens)


def test_rows_of_a_batch_are_the_single_answers(format_of: FormatOf) -> None:
    """In floats: with 8-bit activations a padded row rounds otherwise."""
    bundle = format_of("exact q4")
    session = Session.from_pretrained(bundle, provider="cpu", threads=1)
    prompts = [SENTENCES[0], SENTENCES[1][:9]]
    job = {"folder": str(bundle / "transformers.js"), "prompts": prompts, "new_tokens": NEW_TOKENS}
    found = node("transformers.mjs", task="batch", **job)
    assert found["mask"][1][0] == 0  # the shorter row is padded on the left
    for prompt, ids, mask in zip(prompts, found["ids"], found["mask"], strict=True):
        single = session.text_codec.encode(prompt)
        expected = plainly(session, single)
        assert ids[mask.index(1) : len(mask)] == single
        assert expected.agrees(ids[len(mask) : len(mask) + len(expected.tokens)])


@pytest.mark.parametrize(
    "family", ["qwen3", "gemma3", "gpt2", "opt", "phi3", "exaone", "granitemoehybrid", "helium"]
)
def test_other_families(family: str, tmp_path: Path) -> None:
    """Head sizes of their own, layers of two kinds, learned positions, joined projections, other spellings."""
    bundle = saved(family, tmp_path)
    session = Session.from_pretrained(bundle, provider="cpu", threads=1)
    folder = str(bundle / "transformers.js")
    expected = assert_continued(session, folder, SENTENCES[1][:20])
    assert len(set(expected.tokens)) > 2  # else a wrong cache could go unnoticed


@pytest.mark.parametrize(("family", "recipe"), [("bert", "floats"), ("bert", "int4"), ("roberta", "w8a8")])
def test_features_of_an_encoder(tmp_path: Path, family: str, recipe: str) -> None:
    bundle = saved(family, tmp_path, recipe)
    (expected,) = EncoderSession.from_pretrained(bundle, provider="cpu", threads=1).embed([SENTENCES[2]])
    folder = str(bundle / "transformers.js")
    found = node("transformers.mjs", folder=folder, task="features", prompt=SENTENCES[2])
    np.testing.assert_allclose(
        found["values"], expected, rtol=1e-4, atol=1e-5 if recipe == "floats" else 2e-3
    )


def saved(family: str, place: Path, recipe: str = "floats") -> Path:
    """Export a tiny model of a family, with a tokenizer."""
    tiny_model(family, vocab_size=VOCABULARY).save_pretrained(place / "model")
    trained_tokenizer().save_pretrained(place / "model")
    compress(place / "model", place / "bundle", Recipe.load(recipe), run=Run(threads=1))
    deployment_files(place / "bundle", ["transformers.js"])
    return place / "bundle"


@pytest.mark.skipif("RK_BUNDLE" not in os.environ, reason="RK_BUNDLE names no bundle")
def test_the_bundle_of_a_chat_model(tmp_path: Path) -> None:
    bundle = Path(os.environ["RK_BUNDLE"])
    session = Session.from_pretrained(bundle, provider="cpu", threads=1)
    folder = bundle / "transformers.js"
    assert folder.is_dir(), "first run `rk-export bundle RK_BUNDLE --for transformers.js`"
    assert_continued(session, str(folder), "The harbour was quiet")
    assert_answered(session, str(folder))

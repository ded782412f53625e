"""`Encoder`: texts in any order and number as vectors, and labels of classifiers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_bundles import LABELS, write_classifier, write_embedding_model
from runtime_models import byte_tokenizer, write_encoder
from tokenizers import processors

from rk_export.errors import InputError
from rk_export.runtime import Encoder, EncoderSession

TEXTS = ["harbour", "a", "ship at sea", "", "quay and mast", "b"]
PROMPTS = {"query": "q: ", "passage": "p: "}


def opened(folder: Path) -> Encoder:
    return Encoder(folder, provider="cpu", threads=1)


def alone(encoder: Encoder, text: str) -> np.ndarray:
    ids = np.array([encoder.session.text_codec.encode(text)])
    return encoder.session.sentence_vectors(ids)[0]


@pytest.mark.parametrize("size", [1, 2, 4, 64])
def test_vectors_stand_in_the_order_of_the_texts(tmp_path: Path, size: int) -> None:
    encoder = opened(write_encoder(tmp_path))
    found = encoder.encode(TEXTS, batch_size=size)
    assert (found.shape, found.dtype) == ((len(TEXTS), 8), np.float32)
    np.testing.assert_allclose(found, [alone(encoder, text) for text in TEXTS], atol=1e-6)


def test_a_batch_holds_texts_of_similar_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, shapes = opened(write_encoder(tmp_path)), []
    run = encoder.session.sentence_vectors

    def noted(ids: np.ndarray, *rest: Any) -> np.ndarray:
        shapes.append(ids.shape)
        return run(ids, *rest)

    monkeypatch.setattr(encoder.session, "sentence_vectors", noted)
    encoder.encode(["a" * 9, "b", "c" * 9, "d"], batch_size=2)
    assert shapes[-2:] == [(2, 10), (2, 2)]


def test_a_batch_has_so_many_tokens_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rk_export.runtime.text_encoder.CACHED_TOKENS", 12)
    encoder, shapes = opened(write_encoder(tmp_path)), []
    run = encoder.session.sentence_vectors

    def noted(ids: np.ndarray, *rest: Any) -> np.ndarray:
        shapes.append(ids.shape)
        return run(ids, *rest)

    monkeypatch.setattr(encoder.session, "sentence_vectors", noted)
    texts = ["b", "a" * 15, "ccc", "ddd", "eee", "f", "g"]
    found = encoder.encode(texts)
    assert shapes[-3:] == [(1, 16), (3, 4), (3, 2)]  # more than 12 where one text alone has them
    np.testing.assert_allclose(found, [alone(encoder, text) for text in texts], atol=1e-6)


def test_no_texts_are_no_vectors(tmp_path: Path) -> None:
    assert opened(write_encoder(tmp_path)).encode([]).shape == (0, 8)


def test_the_graphs_own_vector_is_taken(tmp_path: Path) -> None:
    encoder = opened(write_embedding_model(tmp_path, normalizes=False))
    (found,) = encoder.encode(["harbour"])
    ids = np.array([encoder.session.text_codec.encode("harbour")])
    np.testing.assert_allclose(found, encoder.session.forward(ids)[0].max(axis=0), atol=1e-6)
    (scaled,) = encoder.encode(["harbour"], normalize=True)
    np.testing.assert_allclose(scaled, found / np.linalg.norm(found), atol=1e-6)


def test_a_graph_that_scales_cannot_be_asked_not_to(tmp_path: Path) -> None:
    encoder = opened(write_embedding_model(tmp_path))
    assert np.linalg.norm(encoder.encode(["harbour"])) == pytest.approx(1, abs=1e-6)
    with pytest.raises(InputError, match="scales to length 1"):
        encoder.encode(["harbour"], normalize=False)
    plain = opened(write_embedding_model(tmp_path / "plain", normalizes=False))
    assert np.linalg.norm(plain.encode(["harbour"], normalize=False)) != pytest.approx(1, abs=1e-3)


def test_prompts_stand_in_front_of_texts(tmp_path: Path) -> None:
    encoder = opened(write_embedding_model(tmp_path, prompts=PROMPTS, default_prompt_name="passage"))
    assert encoder.prompts == PROMPTS
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "p: a"),
        ({"prompt_name": "query"}, "q: a"),
        ({"prompt": "x"}, "xa"),
        ({"prompt": ""}, "a"),
    ]
    for given, whole in cases:
        np.testing.assert_allclose(encoder.encode(["a"], **given)[0], alone(encoder, whole), atol=1e-6)
    np.testing.assert_allclose(encoder.session.embed(["a"])[0], alone(encoder, "p: a"), atol=1e-6)
    with pytest.raises(InputError, match="known are: query, passage"):
        encoder.encode(["a"], prompt_name="title")
    with pytest.raises(InputError, match="both are given"):
        encoder.encode(["a"], prompt_name="query", prompt="x")


@pytest.mark.parametrize(
    ("files", "longest"),
    [
        ({}, 16),
        ({"sentence_bert_config.json": {"max_seq_length": 4}}, 4),
        ({"sentence_roberta_config.json": {"max_seq_length": 5}}, 5),
        ({"sentence_bert_config.json": {"max_seq_length": 99}}, 16),
        ({"tokenizer_config.json": {"model_max_length": 6}}, 6),
        ({"tokenizer_config.json": {"model_max_length": int(1e30)}}, 16),
    ],
)
def test_long_texts_are_cut(tmp_path: Path, files: dict[str, Any], longest: int) -> None:
    write_encoder(tmp_path)
    for name, values in files.items():
        (tmp_path / name).write_text(json.dumps(values), encoding="utf-8")
    encoder = opened(tmp_path)
    assert encoder.longest == longest
    text = "abcdefghijklmnopqrstuvwxyz"
    np.testing.assert_allclose(encoder.encode([text])[0], alone(encoder, text[: longest - 1]), atol=1e-6)


def test_the_left_end_is_cut_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        '{"truncation_side": "left", "model_max_length": 3}', encoding="utf-8"
    )
    encoder = opened(tmp_path)
    np.testing.assert_allclose(encoder.encode(["abcd"])[0], alone(encoder, "cd"), atol=1e-6)


def test_small_letters_where_the_model_wants_them(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"do_lower_case": true}', encoding="utf-8")
    encoder = opened(tmp_path)
    np.testing.assert_allclose(encoder.encode(["AbC"])[0], alone(encoder, "abc"), atol=1e-6)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ("harbour", r"\[text\]"),
        ([1], "text 0 is a int"),
        (["a", "\ud800"], "text 1 is not UTF-8"),
        (None, "a NoneType"),
        (b"ab", "a bytes"),
        ({"a", "b"}, "a set"),
        ({"a": 1}, "a dict"),
        ([("a",)], "text 0 is a tuple"),
        (["a", ("a", "b")], "text 1 is a tuple"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(tmp_path: Path, texts: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        opened(write_encoder(tmp_path)).encode(texts)


def test_a_batch_of_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch_size"):
        opened(write_encoder(tmp_path)).encode(["a"], batch_size=0)
    with pytest.raises(InputError, match="batch_size"):
        opened(tmp_path).encode(["a"], batch_size=2.5)  # type: ignore[arg-type]


def test_a_classifier_labels_texts_and_pairs(tmp_path: Path) -> None:
    encoder = opened(write_classifier(tmp_path))
    assert encoder.labels == LABELS
    pairs = [("a", "b"), ("quay", "mast"), ("b", "a")]
    found = encoder.classify(pairs, batch_size=2)
    logits = np.asarray(encoder.logits(pairs, batch_size=2))
    for row, (first, second), one in zip(logits, pairs, found, strict=True):
        ids = [256, *first.encode(), 257, *second.encode()]
        types = [0] * (1 + len(first)) + [1] * (1 + len(second))
        expected = encoder.session.logits(np.array([ids]), None, np.array([types]))[0]
        np.testing.assert_allclose(row, expected, atol=1e-5)
        scores = np.exp(expected) / np.exp(expected).sum()
        np.testing.assert_allclose(one.scores, scores, atol=1e-6)
        assert one.label == LABELS[int(expected.argmax())]
        assert one.score == max(one.scores)
    assert len({one.scores for one in found}) == 3
    assert encoder.classify([]) == []


@pytest.mark.parametrize("texts", [[("a",)], [("a", "b", "c")], [("a", 1)], [{"a", "b"}]])
def test_what_is_no_pair_is_refused(tmp_path: Path, texts: Any) -> None:
    with pytest.raises(InputError, match="text 0 is a"):
        opened(write_classifier(tmp_path)).classify(texts)


def test_a_classifier_of_tokens_takes_no_pairs(tmp_path: Path) -> None:
    encoder = opened(write_classifier(tmp_path, by_token=True))
    for call in (encoder.tag, encoder.logits):
        with pytest.raises(InputError, match="text 0 is a tuple"):
            call([("a", "b")])  # type: ignore[list-item]


def test_texts_may_come_one_after_the_other(tmp_path: Path) -> None:
    encoder = opened(write_encoder(tmp_path))
    np.testing.assert_array_equal(encoder.encode(text for text in "ab"), encoder.encode(["a", "b"]))  # type: ignore[arg-type]


def test_a_text_without_tokens_is_refused_by_its_place(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.Sequence([])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="text 1 has no tokens"):
        opened(tmp_path).encode(["a", ""])


def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prompt: a int"):
        opened(write_encoder(tmp_path)).encode(["a"], prompt=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"problem_type": "ranking"}, "problem_type is 'ranking'"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "Tanh"),
    ],
)
def test_scores_that_are_not_known_are_refused(tmp_path: Path, config: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        opened(write_classifier(tmp_path, labels=1, **config)).classify(["a"])


@pytest.mark.parametrize(
    ("config", "labels", "function"),
    [
        ({}, 1, "sigmoid"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, 1, "identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, 1, "identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, 1, "sigmoid"),
        ({"problem_type": "regression"}, 1, "identity"),
        ({"problem_type": "multi_label_classification"}, 3, "sigmoid"),
    ],
)
def test_scores_of_labels_that_exclude_no_other(
    tmp_path: Path, config: dict[str, Any], labels: int, function: str
) -> None:
    encoder = opened(write_classifier(tmp_path, labels=labels, **config))
    logits = np.asarray(encoder.logits(["quay"]))[0]
    expected = logits if function == "identity" else 1 / (1 + np.exp(-logits))
    (found,) = encoder.classify(["quay"])
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)


def test_a_classifier_of_tokens_tags_them(tmp_path: Path) -> None:
    encoder = opened(write_classifier(tmp_path, by_token=True))
    found = encoder.tag(["abc", "", "de"])
    assert [[(one.start, one.end) for one in text] for text in found] == [
        [(0, 1), (1, 2), (2, 3)],
        [],
        [(0, 1), (1, 2)],
    ]
    logits = encoder.session.logits(np.array([[256, *b"abc"]]))[0, 1:]
    assert [one.label for one in found[0]] == [LABELS[int(row.argmax())] for row in logits]
    assert all(1 / 3 <= one.score <= 1 for one in found[0])
    assert [len(row) for row in encoder.logits(["abc", ""])] == [4, 1]


def test_each_kind_of_model_names_the_method_it_has(tmp_path: Path) -> None:
    text, token = (opened(write_classifier(tmp_path / str(kind), by_token=kind)) for kind in (False, True))
    plain = opened(write_encoder(tmp_path / "plain"))
    for call, words in (
        (lambda: text.encode(["a"]), "it gives logits"),
        (lambda: text.tag(["a"]), r"call classify\(texts\)"),
        (lambda: token.classify(["a"]), r"call tag\(texts\)"),
        (lambda: plain.classify(["a"]), "no output logits"),
    ):
        with pytest.raises(InputError, match=words):
            call()


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config_sentence_transformers.json", '{"prompts": {"q": 1}}', "prompts must be texts"),
        ("config_sentence_transformers.json", '{"default_prompt_name": "q"}', "which is no prompt"),
        ("sentence_bert_config.json", '{"max_seq_length": "long"}', "max_seq_length"),
        ("modules.json", "{}", "no list of modules"),
    ],
)
def test_malformed_files_are_refused(tmp_path: Path, file: str, text: str, words: str) -> None:
    write_encoder(tmp_path)
    (tmp_path / file).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        opened(tmp_path)


def test_a_bundle_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        opened(tmp_path)


def test_neither_torch_nor_transformers_is_imported(tmp_path: Path) -> None:
    write_embedding_model(tmp_path)
    script = (
        "import sys; from rk_export.runtime import Encoder; "
        f"Encoder({str(tmp_path)!r}, provider='cpu', threads=1).encode(['a']); "
        "print(sorted({'torch', 'transformers', 'sentence_transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_session_of_a_classifier_gives_no_states(tmp_path: Path) -> None:
    session = EncoderSession.from_pretrained(write_classifier(tmp_path), provider="cpu", threads=1)
    with pytest.raises(InputError, match="no output last_hidden_state, it gives logits"):
        session.forward(np.array([[1, 2]]))

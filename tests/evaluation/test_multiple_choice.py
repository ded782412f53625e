"""Scoring of continuations and tasks, against a model computed row by row; PyTorch and ONNX Runtime side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from rk_export.errors import InputError
from rk_export.evaluation import log_likelihood
from rk_export.evaluation.log_likelihood import Continuation, PairEncoder, log_likelihoods
from rk_export.evaluation.models import ModelScores, evaluate_models, short_names
from rk_export.evaluation.multiple_choice import TaskResult, mean_and_error, score_task
from rk_export.evaluation.perplexity import as_numpy
from rk_export.evaluation.score_table import paired_difference, score_table, scores_json
from rk_export.evaluation.tasks import Task, make_item
from rk_export.model.torch_logits import torch_logits
from rk_export.runtime import Session
from rk_export.runtime.text import TextCodec
from rk_export.source.stored import StoredModel, open_source

VOCAB = 11


def bigram_logits(ids: np.ndarray) -> torch.Tensor:
    """Logits that depend on the current token only."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return table[torch.from_numpy(ids)]


def random_continuations(count: int, vocabulary: int) -> list[Continuation]:
    rng = np.random.default_rng(0)

    def tokens(most: int) -> tuple[int, ...]:
        return tuple(rng.integers(0, vocabulary, rng.integers(1, most)).tolist())

    return [Continuation(tokens(20), tokens(6)) for _ in range(count)]


def one_by_one(logits_fn: Callable[[np.ndarray], Any], one: Continuation) -> tuple[float, bool]:
    """Score one continuation in float64, nothing padded, nothing shared."""
    ids = np.array([one.context + one.tokens])
    log_probs = torch.from_numpy(as_numpy(logits_fn(ids)))[0].double().log_softmax(-1)
    rows = log_probs[len(one.context) - 1 : -1]
    targets = torch.tensor(one.tokens)
    total = float(rows.gather(1, targets[:, None]).sum())
    return total, bool((rows.argmax(-1) == targets).all())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_padded_batches_score_as_single_rows_do(
    source_of: Callable[..., StoredModel], monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    monkeypatch.setattr(log_likelihood, "BATCH_TOKENS", 64)
    logits = torch_logits(source_of(family).load())
    asked = random_continuations(40, 160)
    found = log_likelihoods(logits, asked, max_length=128)
    expected = [one_by_one(logits, one) for one in asked]
    assert [one.log_likelihood for one in found] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]


@pytest.mark.whole
def test_a_bundle_scores_batches_as_single_rows(bundle: Path) -> None:
    logits = Session.from_pretrained(bundle, provider="cpu", threads=1, accuracy_level=0).prefill_logits
    asked = random_continuations(20, 300)
    found = log_likelihoods(logits, asked, max_length=128)
    expected = [one_by_one(logits, one)[0] for one in asked]
    assert [one.log_likelihood for one in found] == pytest.approx(expected, abs=1e-3)


def test_greedy_continuations_are_told() -> None:
    best = int(bigram_logits(np.array([[4]]))[0, 0].argmax())
    after = int(bigram_logits(np.array([[best]]))[0, 0].argmax())
    asked = [Continuation((1, 4), (best, after)), Continuation((1, 4), (best, (after + 1) % VOCAB))]
    assert [one.greedy for one in log_likelihoods(bigram_logits, asked, max_length=9)] == [True, False]


def test_choices_of_one_token_share_a_row_and_batches_keep_to_their_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_likelihood, "BATCH_TOKENS", 12)
    shapes = []

    def logits(ids: np.ndarray) -> torch.Tensor:
        shapes.append(ids.shape)
        return bigram_logits(ids)

    shared = [Continuation((1, 2, 3, 4), (token,)) for token in range(5)]
    others = [Continuation((5,) * length, (1,)) for length in (1, 5, 20)]
    found = log_likelihoods(logits, [*shared, *others], max_length=30)
    assert shapes == [(1, 20), (2, 5), (1, 1)]
    assert [one.log_likelihood for one in found] == pytest.approx(
        [one_by_one(bigram_logits, one)[0] for one in [*shared, *others]]
    )


def test_a_long_context_loses_its_beginning() -> None:
    seen = []

    def logits(ids: np.ndarray) -> torch.Tensor:
        seen.append(ids.tolist())
        return bigram_logits(ids)

    log_likelihoods(logits, [Continuation(tuple(range(10)), (3, 4, 5))], max_length=6)
    assert seen == [[[6, 7, 8, 9, 3, 4]]]
    with pytest.raises(InputError, match="7 tokens is longer than the model's context of 6"):
        log_likelihoods(logits, [Continuation((1,), (2,) * 7)], max_length=6)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits[:, -1:], "logits have shape"),
        (lambda logits: logits[..., :3], "outside the vocabulary of 3"),
        (lambda logits: logits * math.nan, "not finite"),
    ],
)
def test_unusable_logits_are_refused(spoil: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        log_likelihoods(lambda ids: spoil(bigram_logits(ids)), [Continuation((1, 2), (3,))], max_length=9)


@pytest.fixture
def encoder(tmp_path: Path) -> PairEncoder:
    """A word tokenizer with special tokens at both ends; `ab` joined is a word of its own."""
    words = {"<s>": 0, "</s>": 1, "?": 2, "a": 3, "b": 4, "c": 5, "ab": 6, ".": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    special = [("<s>", 0), ("</s>", 1)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return PairEncoder(TextCodec(tmp_path / "tokenizer.json"))


def test_pairs_are_encoded_together_after_the_special_tokens_in_front(encoder: PairEncoder) -> None:
    assert encoder.prefix == (0,)
    assert encoder.pair("a b", " c.") == Continuation((0, 3, 4), (5, 7))
    assert encoder.pair("a b \n", "c") == Continuation((0, 3, 4), (5,))
    assert encoder.pair("<s> a", " b") == Continuation((0, 3), (4,))
    with pytest.raises(InputError, match="'b': is no token of its own"):
        encoder.pair("a", "b")


def test_mean_and_error_are_those_of_the_sample() -> None:
    mean, error = mean_and_error([True, False, False, True, True])
    assert (mean, error) == pytest.approx((0.6, math.sqrt(0.6 * 0.4 / 4)))
    assert math.isnan(mean_and_error([True])[1])
    assert paired_difference([True, True, False, True], [True, False, False, True]) == pytest.approx(
        (0.25, 0.25)
    )


def test_the_likeliest_choice_counts_in_all_and_per_byte(encoder: PairEncoder) -> None:
    """Every token costs ln 11: the shortest choice wins in all, and the one of the most bytes a token per byte."""
    items = [
        make_item("a", ["ab ab", "c", "é é é"], 1),  # losses 2, 1, 3; bytes 5, 1, 8
        make_item("a", ["ab ab", "c", "é é é"], 0),
        make_item("a", ["ab ab", "c", "é é é"], 2),
        make_item("a", ["c", "ab ab", "c c c"], 1),
    ]
    result = score_task(uniform, Task("uniform", tuple(items)), encoder, max_length=9)
    assert (result.right, result.right_norm) == ((True, False, False, False), (False, False, True, True))
    assert (result.items, result.acc, result.acc_norm) == (4, 0.25, 0.5)
    assert (result.perplexity, result.truncated) == (None, 0)
    assert score_task(uniform, Task("short", tuple(items)), encoder, max_length=3).truncated > 0


def uniform(ids: np.ndarray) -> np.ndarray:
    return np.zeros((*ids.shape, VOCAB), np.float32)


def test_the_last_word_has_to_be_greedy_and_has_a_perplexity(encoder: PairEncoder) -> None:
    items = tuple(make_item(context, [word], 0) for context in "abc" for word in ("a", "b", "c b"))
    result = score_task(bigram_logits, Task("words", items), encoder, max_length=9)
    pairs = [encoder.pair(*pair) for item in items for pair in item.pairs()]
    expected = [one_by_one(bigram_logits, pair) for pair in pairs]
    losses = np.array([-total for total, _ in expected])
    assert result.right == tuple(greedy for _, greedy in expected)
    assert result.perplexity == pytest.approx(math.exp(losses.mean()))
    assert result.perplexity_error == pytest.approx(result.perplexity * losses.std(ddof=1) / 3)
    assert result.acc_norm is None


def result_of(right: list[bool], *, last_word: bool = False) -> TaskResult:
    acc, error = mean_and_error(right)
    norm = (None, None) if last_word else (acc, error)
    loss = (2.5, 0.5) if last_word else (None, None)
    answers = tuple(right)
    return TaskResult("t", len(right), acc, error, *norm, *loss, 0, answers, () if last_word else answers)


def test_the_table_shows_errors_and_paired_differences() -> None:
    scores = [
        ModelScores("out/dense", {}, {"t": result_of([True, True, False, True])}),
        ModelScores("out/int4", {}, {"t": result_of([True, False, False, True])}),
    ]
    table = score_table(scores).text()
    assert "0.750 ± 0.250" in table
    assert "-0.250 ± 0.250" in table
    assert "int4 − dense" in table
    dense, int4 = scores_json(scores)
    assert "acc_difference" not in dense["tasks"]["t"]
    assert int4["tasks"]["t"]["acc_norm_difference"] == pytest.approx(-0.25)
    assert "right" not in json.dumps([dense, int4])


def test_what_is_not_defined_is_null_in_json_and_left_out_of_the_table() -> None:
    scores = [ModelScores(name, {}, {"t": result_of([True], last_word=True)}) for name in "ab"]
    rows = score_table(scores).text()
    assert "acc_norm" not in rows
    assert "2.500 ± 0.500" in rows
    fields = scores_json(scores)[1]["tasks"]["t"]
    assert fields["acc_error"] is fields["acc_norm"] is fields["acc_norm_difference"] is None


def test_names_are_short_where_they_differ() -> None:
    assert short_names(["a/x", "b/y"]) == ["x", "y"]
    assert short_names(["a/x", "b/x"]) == ["a/x", "b/x"]


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    items = [
        {"context": "The train leaves at", "choices": ["9:15", "the gulls", "salt"], "gold": 0},
        {"context": "Add the", "choices": ["salt", "harbour"], "gold": 0},
        {"context": "The committee met on", "choices": ["Tuesday", "masts"], "gold": 1},
    ]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(map(json.dumps, items)), encoding="utf-8")
    return path


@pytest.mark.whole
def test_eval_compares_models_on_texts_and_tasks(
    cli: Cli, llama: Path, bundle: Path, prose: Path, task_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The gulls moved between the masts and the harbour was quiet. " * 5, encoding="utf-8")
    command = ("eval", llama, bundle, "--text", prose, other, "--context", 32, "--tasks", task_file)
    ended = cli(*command, "--provider", "cpu", "--threads", 1, "--json")
    assert ended.code == 0, ended.err
    dense, compressed = json.loads(ended.out)
    assert (dense["model"], compressed["model"]) == (str(llama), str(bundle))
    assert set(dense["texts"]) == {"prose.txt", "other.txt"}
    for text in dense["texts"].values():
        assert text["perplexity_error"] == pytest.approx(text["perplexity"] * text["standard_error"])
    assert dense["tasks"]["own"]["items"] == 3
    assert "acc_difference_error" in compressed["tasks"]["own"]

    encoder, model = PairEncoder(TextCodec(llama / "tokenizer.json")), open_source(llama).load()
    items = [json.loads(line) for line in task_file.read_text(encoding="utf-8").splitlines()]
    right = 0
    for item in items:
        pairs = [encoder.pair(item["context"], f" {choice}") for choice in item["choices"]]
        totals = [one_by_one(torch_logits(model), pair)[0] for pair in pairs]
        right += totals.index(max(totals)) == item["gold"]
    assert dense["tasks"]["own"]["acc"] == pytest.approx(right / 3)

    shown = cli(*command, "--limit", 2, "--provider", "cpu")
    assert shown.code == 0, shown.err
    assert "own (2 items)" in shown.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "eval: nothing to measure"),
        (("--tasks", "openbookqa"), "openbookqa: no such task file"),
        (("--tasks", "TASK", "--limit", 0), "--limit: 0 items cannot be asked"),
        (("--tasks", "TASK", "TASK"), "--tasks: two tasks have the same name"),
    ],
)
def test_impossible_evaluations_are_refused(
    cli: Cli, llama: Path, task_file: Path, arguments: tuple[object, ...], message: str
) -> None:
    words = [str(word).replace("TASK", str(task_file)) for word in arguments]
    ended = cli("eval", llama, *words)
    assert ended.code == 2
    assert f"rk-export: error: {message}" in ended.err
    assert "\nFix: " in ended.err


def test_every_model_and_text_is_checked_before_the_first_is_measured(
    source_of: Callable[..., StoredModel], llama: Path, task_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoredModel, "load", lambda source: pytest.fail("the refusal came too late"))
    task = Task("t", (make_item("a", ["b", "c"], 0),))
    with pytest.raises(InputError, match="--tasks: bert is an encoder"):
        evaluate_models([llama, source_of("bert").folder], tasks=[task])
    with pytest.raises(InputError, match=r"tokenizer\.json: no such file"):
        evaluate_models([llama, source_of("llama").folder], tasks=[task])

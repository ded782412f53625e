"""The perplexity protocol: windows, what is predicted, numerics, refusals, and reading the text."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy

from rk_export.errors import InputError
from rk_export.evaluation.perplexity import paired_perplexity, perplexity, token_nll
from rk_export.text import tokens_of

VOCAB = 11


def table_logits(ids: np.ndarray) -> torch.Tensor:
    """A bigram model: logits depend on the current token only."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3))
    return table[torch.from_numpy(ids)]


def test_windows_do_not_overlap_and_their_first_token_is_not_predicted() -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 23)
    seen = []

    def logits_fn(window: np.ndarray) -> torch.Tensor:
        seen.append(window)
        return table_logits(window)

    result = perplexity(logits_fn, ids, context=8)

    assert all(window.dtype == np.int64 and window.shape[0] == 1 for window in seen)
    np.testing.assert_array_equal(np.concatenate(seen, axis=1)[0], ids)
    losses = [
        cross_entropy(table_logits(w)[0, :-1], torch.from_numpy(w[0, 1:]), reduction="sum") for w in seen
    ]
    assert (result.windows, result.tokens) == (3, 7 + 7 + 6)
    assert result.nll == pytest.approx(float(sum(losses)) / 20, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(result.nll))


def test_a_rest_of_one_token_is_dropped_and_the_limit_counts_tokens() -> None:
    ids = np.arange(40) % VOCAB
    assert perplexity(table_logits, ids[:17], context=8).tokens == 14
    assert perplexity(table_logits, ids, context=8, limit=16) == perplexity(table_logits, ids[:16], context=8)


def test_the_standard_error_is_that_of_the_window_means() -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, 64)
    result = perplexity(table_logits, ids, context=8)
    means = [perplexity(table_logits, window, context=8).nll for window in ids.reshape(8, 8)]
    assert result.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(8))
    assert math.isnan(perplexity(table_logits, ids[:8], context=8).standard_error)


@pytest.mark.parametrize("kind", ["numpy16", "numpy32", "bfloat16", "torch64"])
def test_every_float_type_is_taken(kind: str) -> None:
    ids = np.arange(30) % VOCAB
    reference = perplexity(table_logits, ids, context=10).nll
    convert = {
        "numpy16": lambda x: x.numpy().astype(np.float16),
        "numpy32": lambda x: x.numpy(),
        "bfloat16": lambda x: x.bfloat16(),
        "torch64": lambda x: x.double().requires_grad_(),
    }[kind]
    assert perplexity(lambda w: convert(table_logits(w)), ids, context=10).nll == pytest.approx(
        reference, rel=1e-2
    )


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[1e4, 0.0, -1e4], [3e4, 3e4, 0.0]], dtype=np.float32)
    assert token_nll(logits, np.array([0, 1])) == pytest.approx(math.log(2))


def test_uniform_logits_give_the_vocabulary_size_across_chunks() -> None:
    ids = np.arange(700) % VOCAB
    result = perplexity(lambda w: np.zeros((*w.shape, VOCAB), np.float32), ids, context=600)
    assert result.perplexity == pytest.approx(VOCAB)
    assert result.tokens == 599 + 99


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_text_too_short_is_refused(tokens: int) -> None:
    with pytest.raises(InputError, match="at least 2"):
        perplexity(table_logits, np.zeros(tokens, dtype=np.int64))


def test_impossible_options_and_bad_logits_are_refused() -> None:
    ids = np.arange(20) % VOCAB
    with pytest.raises(InputError, match="context of 1"):
        perplexity(table_logits, ids, context=1)
    with pytest.raises(InputError, match="limit of 0"):
        perplexity(table_logits, ids, limit=0)
    with pytest.raises(InputError, match="outside the vocabulary"):
        perplexity(lambda w: table_logits(w)[..., :5], ids, context=8)
    with pytest.raises(InputError, match="not finite"):
        perplexity(lambda w: table_logits(w) * math.nan, ids)
    with pytest.raises(InputError, match="shape"):
        perplexity(lambda w: table_logits(w)[:, -1:], ids)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_text_is_tokenized_whole_and_without_special_tokens(tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a b c a a a b")
    ids = tokens_of(tmp_path / "text.txt", tokenizer_folder)
    assert ids.dtype == np.int64
    assert ids.tolist() == [1, 2, 3, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b" \n ", "empty"),
        (b"\xff\xfe\x00", "not a UTF-8"),
        (b"ab\x00cd", "binary"),
        (None, "no such"),
    ],
)
def test_a_file_that_is_no_text_is_refused(
    tokenizer_folder: Path, tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        tokens_of(path, tokenizer_folder)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a b")
    with pytest.raises(InputError, match=r"tokenizer\.json is missing"):
        tokens_of(tmp_path / "text.txt", tmp_path)


def test_the_paired_difference_has_the_error_of_the_differences() -> None:
    ids = np.random.default_rng(1).integers(0, VOCAB, 64)
    noise = np.random.default_rng(2).standard_normal((VOCAB, VOCAB)).astype(np.float32) * 0.05

    def nearly(window: np.ndarray) -> np.ndarray:
        return np.asarray(table_logits(window)) + noise[window]

    theirs, mine = (perplexity(logits, ids, context=8) for logits in (table_logits, nearly))
    paired = paired_perplexity(mine, theirs)
    assert paired is not None
    assert paired[0] == mine.perplexity - theirs.perplexity
    assert 0 < paired[1] < 0.3 * theirs.perplexity_error  # both find the same windows hard
    assert paired_perplexity(mine, mine) == (0.0, 0.0)


def test_the_paired_error_is_that_of_the_jackknife() -> None:
    """Leaving out one window at a time estimates the same error without any formula of ours."""
    ids = np.random.default_rng(3).integers(0, VOCAB, 320)

    def other(window: np.ndarray) -> torch.Tensor:
        return table_logits(window) * 0.9

    def difference(tokens: np.ndarray) -> tuple[float, float]:
        paired = paired_perplexity(*(perplexity(f, tokens, context=8) for f in (other, table_logits)))
        assert paired is not None
        return paired

    windows = ids.reshape(40, 8)
    left_out = [difference(np.delete(windows, row, axis=0).ravel())[0] for row in range(40)]
    jackknife = math.sqrt(39 / 40 * float(((np.array(left_out) - np.mean(left_out)) ** 2).sum()))
    assert difference(ids)[1] == pytest.approx(jackknife, rel=0.05)


def test_other_windows_have_no_paired_difference_and_one_window_no_error() -> None:
    ids = np.arange(24) % VOCAB
    whole = perplexity(table_logits, ids, context=8)
    assert paired_perplexity(whole, perplexity(table_logits, ids, context=12)) is None
    alone = perplexity(table_logits, ids[:8], context=8)
    assert math.isnan((paired_perplexity(alone, alone) or (0, 0))[1])

"""Sampled text against whole forward passes, its seed and its start tokens, and the cache that keeps it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import DECODERS, tiny_model

from rk_export.calibration import self_text as module
from rk_export.calibration.self_text import draw, sample_text, self_text, start_token
from rk_export.errors import InputError
from rk_export.source.stored import StoredModel, open_source

pytestmark = pytest.mark.slow

SourceOf = Callable[..., StoredModel]
CPU = torch.device("cpu")


@pytest.mark.parametrize("family", DECODERS)
def test_each_token_is_drawn_from_the_whole_models_distribution(source_of: SourceOf, family: str) -> None:
    """Step by step with cached keys and values equals one pass over the finished text."""
    source = source_of(family)
    uniforms = torch.rand(6, 24, generator=torch.Generator().manual_seed(3))
    model = module.sampling_model(source, CPU, torch.float32)
    text = sample_text(model, uniforms, start=1, ends=[2])
    with torch.no_grad():
        logits = source.load()(input_ids=text, use_cache=False).logits
    expected = draw(logits[:, :-1].flatten(0, 1), uniforms[:, 1:].flatten()).view(6, 23)
    expected[text[:, :-1] == 2] = 1
    assert torch.equal(text[:, 1:], expected)
    assert (text[:, 0] == 1).all()


def test_draws_follow_the_distribution() -> None:
    """Evenly spaced uniforms give every token its share; a token of probability 0 never comes."""
    logits = torch.tensor([0.5, -1.0, -torch.inf, 2.0, 1.0, -torch.inf])
    count = 10_000
    uniforms = (torch.arange(count) + 0.5) / count
    drawn = draw(logits.expand(count, -1), uniforms)
    shares = torch.bincount(drawn, minlength=6) / count
    torch.testing.assert_close(shares, logits.softmax(-1), atol=2e-4, rtol=0)
    extremes = torch.tensor([0.0, 1 - 2**-24])
    assert draw(torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf]).expand(2, -1), extremes).tolist() == [1, 2]


def test_logits_that_are_not_finite_are_refused() -> None:
    with pytest.raises(InputError, match="not finite"):
        draw(torch.tensor([[0.0, torch.nan]]), torch.tensor([0.5]))


def test_length_start_and_seed(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")  # 128 positions
    text = self_text(source, 700, 0, CPU, cache_dir=tmp_path / "a")
    assert (text.dtype, tuple(text.shape)) == (torch.int64, (6, 128))
    assert torch.equal(text, self_text(source, 700, 0, CPU, cache_dir=tmp_path / "b"))
    assert not torch.equal(text, self_text(source, 700, 1, CPU, cache_dir=tmp_path / "a"))
    ended = text[:, :-1] == 2
    assert ended.any()
    assert (text[:, 1:][ended] == 1).all()


def test_a_start_token_that_ends_text_needs_no_other(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("gpt2", bos_token_id=2, eos_token_id=[2, 7])
    text = self_text(source, 512, 0, CPU, cache_dir=tmp_path)
    after_start, after_other = text[:, 1:][text[:, :-1] == 2], text[:, 1:][text[:, :-1] == 7]
    assert after_other.numel()
    assert (after_other == 2).all()
    assert (after_start != 2).any()


def test_sequences_are_sampled_in_batches_of_bounded_memory(
    source_of: SourceOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = module.sampling_model(source_of("llama"), CPU, torch.float32)
    uniforms = torch.rand(7, 20, generator=torch.Generator().manual_seed(0))
    whole = sample_text(model, uniforms, 1, [2])
    monkeypatch.setattr(
        module, "_CACHE_BYTES", 3 * 2 * 2 * 2 * 16 * 20 * 4
    )  # keys and values of three sequences
    batches: list[int] = []
    sample = module._sample_batch
    monkeypatch.setattr(
        module,
        "_sample_batch",
        lambda model, part, *rest: batches.append(len(part)) or sample(model, part, *rest),
    )
    assert torch.equal(sample_text(model, uniforms, 1, [2]), whole)
    assert batches == [3, 3, 1]


def test_sampled_text_is_read_again(
    source_of: SourceOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of("llama")
    text = self_text(source, 512, 0, CPU, cache_dir=tmp_path)
    monkeypatch.setattr(module, "sample_text", lambda *args: pytest.fail("sampled again"))
    assert torch.equal(self_text(source, 512, 0, CPU, cache_dir=tmp_path), text)
    with pytest.raises(pytest.fail.Exception):
        self_text(source, 512, 1, CPU, cache_dir=tmp_path)


@pytest.mark.parametrize("content", [b"", b"no safetensors", None])
def test_a_broken_cache_file_is_replaced(
    source_of: SourceOf, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    source = source_of("llama")
    text = self_text(source, 512, 0, CPU, cache_dir=tmp_path)
    (path,) = (tmp_path / "self-text").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] if content is None else content)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(self_text(source, 512, 0, CPU, cache_dir=tmp_path), text)
    assert "made anew" in caplog.text
    assert path.read_bytes() == whole
    assert list((tmp_path / "self-text").iterdir()) == [path]


def test_a_cache_that_cannot_be_written_is_no_error(
    source_of: SourceOf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "self-text").write_text("a file where the folder would be")
    with caplog.at_level(logging.WARNING):
        assert len(self_text(source_of("llama"), 512, 0, CPU, cache_dir=tmp_path)) == 4
    assert "not cached" in caplog.text


def test_the_fingerprint_is_of_the_content(source_of: SourceOf, tmp_path: Path) -> None:
    source = source_of("llama")
    copy = Path(shutil.copytree(source.folder, tmp_path / "copy"))
    assert open_source(copy).fingerprint() == source.fingerprint()
    other = tmp_path / "other"
    tiny_model("llama", seed=1).save_pretrained(other)
    assert open_source(other).fingerprint() != source.fingerprint()


@pytest.mark.parametrize(
    ("fields", "token", "name"),
    [
        ({"bos_token_id": 5, "eos_token_id": [6, 7]}, 5, "bos_token_id"),
        ({"bos_token_id": None, "eos_token_id": [6, 7]}, 6, "eos_token_id"),
        ({"bos_token_id": None, "eos_token_id": 6, "decoder_start_token_id": 4}, 4, "decoder_start_token_id"),
    ],
)
def test_start_token_of_the_config(
    source_of: SourceOf, caplog: pytest.LogCaptureFixture, fields: dict[str, Any], token: int, name: str
) -> None:
    source = source_of("llama", **fields)
    for field, value in fields.items():
        setattr(source.config, field, value)
    with caplog.at_level(logging.INFO):
        assert start_token(source) == token
    assert name in caplog.text


def test_start_token_of_the_tokenizer(tmp_path: Path, llama: Path) -> None:
    folder = tmp_path / "model"
    tiny_model("llama", vocab_size=320, bos_token_id=None, eos_token_id=None).save_pretrained(folder)
    source = open_source(folder)
    with pytest.raises(InputError, match="names no token"):
        start_token(source)
    shutil.copy(llama / "tokenizer.json", folder)
    assert start_token(source) == 0  # <pad>, the first of them


def test_an_encoder_writes_no_text(source_of: SourceOf) -> None:
    with pytest.raises(InputError, match="encoder"):
        self_text(source_of("bert"), 512, 0, CPU)

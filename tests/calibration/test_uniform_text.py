"""Random tokens that stand for the text of an encoder, and the loss that they are weighed by."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, trained_tokenizer
from tiny_models import tiny_model

from rk_export.calibration.objectives import output_error
from rk_export.calibration.sensitivity import dense_statistics
from rk_export.calibration.text_run import TextRun
from rk_export.calibration.uniform_text import LENGTH, uniform_text
from rk_export.source.stored import StoredModel, open_source


@pytest.fixture
def bert(tmp_path: Path) -> StoredModel:
    tiny_model("bert", vocab_size=VOCABULARY, max_position_embeddings=40).save_pretrained(tmp_path)
    return open_source(tmp_path)


def test_every_ordinary_token_is_drawn(bert: StoredModel) -> None:
    text = uniform_text(bert, 20_000, 0)
    assert text.shape == (500, min(40, LENGTH))
    assert torch.equal(text, uniform_text(bert, 20_000, 0))
    assert not torch.equal(text, uniform_text(bert, 20_000, 1))
    assert set(range(3, VOCABULARY)) == set(text.unique().tolist())


def test_special_tokens_stand_around_a_text_as_the_tokenizer_puts_them(
    bert: StoredModel, tmp_path: Path
) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = trained_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path)
    text = uniform_text(bert, 1000, 0)
    assert set(text[:, 0].tolist()) == {1}
    assert set(text[:, -1].tolist()) == {2}
    assert not set(text[:, 1:-1].unique().tolist()) & {0, 1, 2}


def test_gradients_predict_the_error_of_the_states(bert: StoredModel) -> None:
    """Half the mean square of the objective's change over directions is half the squared relative error."""
    tokens = uniform_text(bert, 400, 0)
    model = bert.load()
    run = TextRun(model, bert.architecture, [tokens], back=1)
    run.forward("states")
    states = torch.cat(list(run.logits()))
    change = 0.01 * torch.randn(states.shape, generator=torch.Generator().manual_seed(99))
    spread = (states - states.mean(0)).square().sum(1).mean()
    felt = []
    for seed in range(40):
        objective = output_error(run, seed)
        felt += [
            float(objective(change[place : place + 1], slice(place, place + 1)))
            for place in range(0, len(states), 9)
        ]
    expected = float(change[::9].square().sum(1).mean() / spread)
    assert torch.tensor(felt).square().mean() == pytest.approx(expected, rel=0.15)


def test_statistics_of_an_encoder_hold_gradients(bert: StoredModel, tmp_path: Path) -> None:
    tokens = uniform_text(bert, 800, 0)
    known = dense_statistics(
        bert, tokens, diagonal=True, device=torch.device("cpu"), gradient_tokens=400, cache_dir=tmp_path / "c"
    )
    assert known.embedding is not None
    assert known.embedding.shape == (64,)
    assert float(known.embedding.min()) > 0

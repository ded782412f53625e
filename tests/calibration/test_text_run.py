"""Text that runs through a model a layer at a time, against the whole model at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from rk_export.calibration import text_run
from rk_export.calibration.text_run import TextRun
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]


def text_of(source: StoredModel) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, source.config.vocab_size, (5, 12), generator=generator)


def run_of(source: StoredModel, *, back: int = 0) -> TextRun:
    chunks = torch.split(text_of(source), 2)
    return TextRun(source.load(), source.architecture, chunks, back=back, dtype=torch.float32)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3"])
def test_its_logits_are_the_models(source_of: SourceOf, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    source = source_of(family)
    monkeypatch.setattr(text_run, "LOGITS_TOGETHER", 7 * int(source.config.vocab_size))
    run = run_of(source)
    run.forward("layers")
    found = list(run.logits())
    assert all(len(part) <= 7 for part in found)
    with torch.no_grad():
        expected = source.load()(input_ids=text_of(source), use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_its_gradients_are_autograds(source_of: SourceOf, family: str) -> None:
    """The first four sequences run back; what is differentiated weighs every logit by its place."""
    source = source_of(family)
    weights = torch.linspace(-1, 1, 4 * 12 * int(source.config.vocab_size)).view(4 * 12, -1)
    run = run_of(source, back=2)
    run.forward("layers")
    run.backward("layers", lambda logits, places: (logits * weights[places]).sum())
    found = torch.cat(list(run.embedded()))
    model, written = source.load(), list[Tensor]()

    def note(module: object, arguments: object, output: Tensor) -> Tensor:
        written.append(output.detach().requires_grad_())
        return written[0]

    model.get_submodule(source.architecture.embedding).register_forward_hook(note)
    logits = model(input_ids=text_of(source)[:4], use_cache=False).logits.flatten(0, 1)
    (logits * weights).sum().backward()
    expected = written[0].grad
    assert expected is not None
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def test_one_layer_after_the_other(source_of: SourceOf) -> None:
    seen: list[int] = []

    @contextmanager
    def watched(index: int) -> Iterator[None]:
        seen.append(index)
        yield

    source = source_of("llama")
    run = run_of(source, back=1)
    run.forward("layers", watched)
    run.backward("layers", lambda logits, places: logits.sum(), watched)
    layers = list(range(source.layer_count))
    assert seen == [*layers, *reversed(layers)]

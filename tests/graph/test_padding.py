"""Masks padded left, right and with a hole: every row equals the single row in transformers, prefill and decode."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed import OnnxModel, SourceOf, compress, floats, logits
from tiny_models import DECODERS
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

BOUND = 1e-4
LENGTHS, NEW = (9, 4, 6), 3
LONGEST = max(LENGTHS)
Exported = Callable[[str], tuple[OnnxModel, PreTrainedModel]]


@pytest.fixture(scope="module")
def exported(source_of: SourceOf, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a function from a family to its dense graph and the model in transformers; made once."""

    @cache
    def pair(family: str) -> tuple[OnnxModel, PreTrainedModel]:
        source = source_of(family)
        model = AutoModelForCausalLM.from_pretrained(source.folder, attn_implementation="eager").eval()
        return OnnxModel(compress(source, floats(())), tmp_path_factory.mktemp("onnx")), model

    return pair


def rows() -> list[Tensor]:
    """Return the tokens of each row, prompt and continuation."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 160, (length + NEW,), generator=generator) for length in LENGTHS]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert float((actual - expected).abs().max()) <= BOUND * float(expected.abs().max())


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Return the prompts (rows, longest), padded with a token that is a word elsewhere, and their mask."""
    ids, mask = torch.full((len(LENGTHS), LONGEST), 7), torch.zeros(len(LENGTHS), LONGEST, dtype=torch.int64)
    for index, (row, length) in enumerate(zip(rows(), LENGTHS, strict=True)):
        place = slice(LONGEST - length, None) if side == "left" else slice(length)
        ids[index, place], mask[index, place] = row[:length], 1
    return ids, mask


def step_mask(form: str, prompt: Tensor, steps: int) -> Tensor:
    """Return the mask of a later call: new ones behind everything, or right behind each row's prompt."""
    if form != "slots":
        return torch.cat([prompt, torch.ones(len(prompt), steps, dtype=torch.int64)], dim=1)
    ends = prompt.sum(1, keepdim=True) + steps
    return (torch.arange(prompt.shape[1] + steps) < ends).to(torch.int64)


@pytest.mark.whole
@pytest.mark.parametrize("form", ["left", "right", "slots"])
@pytest.mark.parametrize("family", DECODERS)
def test_padded_rows_equal_single_rows(exported: Exported, family: str, form: str) -> None:
    """`right` is what GenAI's Generator feeds, with a hole while decoding; `slots` is what its Engine feeds."""
    graph, model = exported(family)
    ids, mask = padded("left" if form == "left" else "right")
    prefill, past = graph.run(ids, mask)
    found = [prefill[index, mask[index] == 1] for index in range(len(LENGTHS))]
    for step in range(NEW):
        tokens = torch.stack([row[length + step] for row, length in zip(rows(), LENGTHS, strict=True)])
        output, past = graph.run(tokens[:, None], step_mask(form, mask, step + 1), past)
        found = [torch.cat([done, new]) for done, new in zip(found, output, strict=True)]
    for row, logits_of_row in zip(rows(), found, strict=True):
        assert_close(logits_of_row, logits(model, row[None])[0])


@pytest.mark.whole
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt"])
def test_a_hole_in_a_prompt_hides_its_keys(exported: Exported, family: str) -> None:
    graph, model = exported(family)
    ids, mask = rows()[0][None], torch.ones(1, LENGTHS[0] + NEW, dtype=torch.int64)
    mask[0, [0, 4, 5]] = 0
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if family == "gpt2" else {}
    expected = logits(model, ids, attention_mask=mask, **positions)
    assert float((expected - logits(model, ids)).abs().max()) > 0.01, "the hole changes nothing"
    actual, _ = graph.run(ids, mask)
    assert_close(actual[mask == 1], expected[mask == 1])


@pytest.mark.whole
def test_a_row_of_zeros_disturbs_no_other_row(exported: Exported) -> None:
    graph, model = exported("llama")
    prompt = rows()[0][None, :LONGEST]
    ids, mask = prompt.repeat(2, 1), torch.ones(2, LONGEST, dtype=torch.int64)
    mask[1] = 0
    first, past = graph.run(ids, mask)
    token = rows()[0][None, LONGEST : LONGEST + 1]
    later_mask = torch.cat([mask, torch.tensor([[1], [0]])], dim=1)
    later, _ = graph.run(token.repeat(2, 1), later_mask, past)
    assert_close(torch.cat([first[0], later[0]]), logits(model, rows()[0][None, : LONGEST + 1])[0])


@pytest.mark.whole
def test_padding_in_half_precision(source_of: SourceOf, tmp_path: Path) -> None:
    rewritten = compress(source_of("llama"), floats((), ep="portable"))
    half = OnnxModel(rewritten, tmp_path)
    ids, mask = padded("right")
    together, _ = half.run(ids, mask)
    for index, (row, length) in enumerate(zip(rows(), LENGTHS, strict=True)):
        alone, _ = half.run(row[None, :length])
        difference = np.abs(together[index, :length].numpy() - alone[0].numpy()).max()
        assert difference <= 5e-3 * np.abs(alone.numpy()).max()


@pytest.mark.whole
def test_the_batch_has_the_name_that_transformers_js_looks_for(exported: Exported) -> None:
    graph, _ = exported("llama")
    values = (*graph.session.get_inputs(), *graph.session.get_outputs())
    assert {value.shape[0] for value in values} == {"batch_size"}

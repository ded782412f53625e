"""How far an exported graph is from the untouched model as transformers loads it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path

import torch
from compressed import OnnxFile, logits
from tiny_models import auto_class, transformers_own
from torch import Tensor
from transformers import PreTrainedModel

# Largest difference over the largest logit that float32 costs where nothing is dropped.
BOUND = 1e-5
VOCABULARY = 160
LENGTHS, NEW = (14, 4, 9), 4
LONGEST = max(LENGTHS)
PAD = 7  # a token that is a word elsewhere


def untouched(family: str, folder: Path) -> PreTrainedModel:
    """Return a folder's model as transformers loads it."""
    return transformers_own(folder, auto_class(family))


def words(batch: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> Tensor:
    """Return random token ids; none is special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (batch, length), generator=generator)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest expected value; what is no number is infinitely far."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} instead of {tuple(expected.shape)}"
    found = float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())
    return found if found == found else float("inf")


def decoder_errors(graph: OnnxFile, model: PreTrainedModel) -> dict[str, float]:
    """Return how far a decoder is from transformers in each way in which a runtime feeds it."""
    return {
        "prefill": prefill_error(graph, model),
        "steps": steps_error(graph, model),
        **{f"padded {form}": padded_error(graph, model, form) for form in ("left", "right", "slots")},
        "hole": hole_error(graph, model),
    }


def encoder_errors(graph: OnnxFile, model: PreTrainedModel) -> dict[str, float]:
    """Return how far what an encoder gives is from transformers', text by text, however it is padded."""
    rows = [words(1, length, seed=3 + length)[0] for length in LENGTHS]
    errors = {"prefill": prefill_error(graph, model), "hole": hole_error(graph, model)}
    for form in ("left", "right"):
        ids, mask = _padded(rows, left=form == "left", pad=model.config.pad_token_id)
        found = graph.run(ids, mask)[0]
        pairs = zip(_of_texts(found, mask), rows, strict=True)
        errors[f"padded {form}"] = max(distance(own, logits(model, row[None])[0]) for own, row in pairs)
    return errors


def _seen(output: Tensor, mask: Tensor) -> Tensor:
    """Return what is given for tokens that the mask shows, or for whole texts."""
    return output if output.ndim == 2 else output[mask == 1]


def _of_texts(output: Tensor, mask: Tensor) -> list[Tensor]:
    """Return what is given for each text: for its tokens, or for the whole of it."""
    if output.ndim == 2:
        return list(output)
    return [row[own == 1] for row, own in zip(output, mask, strict=True)]


def rounding(model: PreTrainedModel, ids: Tensor) -> float:
    """Return how far transformers' own float32 is from its float64."""
    exact = copy.deepcopy(model).double()
    exact.config._experts_implementation = "eager"  # the default kernel of mixtures knows no float64
    expected = logits(exact, ids)
    return distance(logits(model, ids), expected)


def prefill_error(graph: OnnxFile, model: PreTrainedModel, length: int = 24) -> float:
    """Two rows at once, longer than every window and original length of the tiny models."""
    ids = words(2, length, vocabulary=model.config.vocab_size)
    return distance(graph.run(ids)[0], logits(model, ids))


def steps_error(graph: OnnxFile, model: PreTrainedModel, length: int = 24) -> float:
    """One row in pieces of unequal length, then token by token."""
    ids, parts, past = words(1, length, vocabulary=model.config.vocab_size), [], None
    ends = (length - 10, length - 5, *range(length - 4, length + 1))
    for start, end in zip((0, *ends), ends, strict=False):
        part, past = graph.run(ids[:, start:end], torch.ones(1, end, dtype=torch.int64), past)
        parts.append(part)
    return distance(torch.cat(parts, dim=1), logits(model, ids))


def padded_error(graph: OnnxFile, model: PreTrainedModel, form: str) -> float:
    """Three rows of unequal length, prompt and decode, each against the row alone.

    Args:
        graph: The decoder.
        model: The untouched model.
        form: Padded on the `left`; on the `right`, as GenAI's Generator does, with a hole while decoding; or on the
            right without one, as the `slots` of its Engine.
    """
    rows = [words(1, length + NEW, seed=3 + length)[0] for length in LENGTHS]
    ids, mask = _padded(rows, left=form == "left")
    prefill, past = graph.run(ids, mask)
    found = [prefill[index, mask[index] == 1] for index in range(len(rows))]
    for step in range(NEW):
        tokens = torch.stack([row[length + step] for row, length in zip(rows, LENGTHS, strict=True)])
        output, past = graph.run(tokens[:, None], _later_mask(form, mask, step + 1), past)
        found = [torch.cat([done, new]) for done, new in zip(found, output, strict=True)]
    pairs = zip(found, rows, strict=True)
    return max(distance(logits_of_row, logits(model, row[None])[0]) for logits_of_row, row in pairs)


def hole_error(graph: OnnxFile, model: PreTrainedModel) -> float:
    """A prompt whose mask hides some keys, against transformers with the same mask.

    Positions are those of the columns or those that `generate` counts from the mask: rotation in an attention that
    sees differences alone has the former here, learned positions the latter. The hole is where a factor that grows
    every eight positions is the same for both.
    """
    ids, mask = words(1, 14), torch.ones(1, 14, dtype=torch.int64)
    mask[0, [9, 10]] = 0
    actual = _seen(graph.run(ids, mask)[0], mask)
    counted: list[Mapping[str, Tensor]] = [{}]
    if "position_ids" in inspect.signature(model.forward).parameters:
        counted.append({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)})
    expected = [_seen(logits(model, ids, attention_mask=mask, **positions), mask) for positions in counted]
    whole = _seen(logits(model, ids), mask)
    assert min(distance(whole, one) for one in expected) > 100 * BOUND, "the hole changes nothing"
    return min(distance(actual, one) for one in expected)


def _padded(rows: list[Tensor], *, left: bool, pad: int = PAD) -> tuple[Tensor, Tensor]:
    ids, mask = torch.full((len(rows), LONGEST), pad), torch.zeros(len(rows), LONGEST, dtype=torch.int64)
    for index, (row, length) in enumerate(zip(rows, LENGTHS, strict=True)):
        place = slice(LONGEST - length, None) if left else slice(length)
        ids[index, place], mask[index, place] = row[:length], 1
    return ids, mask


def _later_mask(form: str, prompt: Tensor, steps: int) -> Tensor:
    """Return the mask of a later call: new ones behind everything, or right behind each row's prompt."""
    if form != "slots":
        return torch.cat([prompt, torch.ones(len(prompt), steps, dtype=torch.int64)], dim=1)
    ends = prompt.sum(1, keepdim=True) + steps
    return (torch.arange(prompt.shape[1] + steps) < ends).to(torch.int64)

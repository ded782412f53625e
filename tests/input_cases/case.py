"""One input: how it is made, which command reads it, and what became of it beside transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from transformers import PreTrainedModel

from rk_export import Recipe, Run, compress, export
from rk_export.errors import RkExportError
from rk_export.report.records import Report
from rk_export.runtime import GenerationOptions, Session

Outcome = Literal["read", "merged", "dequantized", "carried", "refused"]
TOLERANCE = 1e-4  # of the largest logit, in float32
TEXTS = 2


@dataclass(frozen=True)
class Given:
    """What a case brings.

    Args:
        model: What the command is given.
        reference: Returns transformers' model of it, float32 and eager; None where the input is refused, or where it
            is rounded, so that the tiers of parity are what counts.
        base: The base model of an adapter, if it is named.
        recipe: Of `compress`.
        context: Tokens that `export` is asked for; None leaves the model's own.
        placed: What is done to the bundle before it is opened.
        prompt: Token ids that are continued greedily, here and by transformers; empty continues none.
        new_tokens: How many follow the prompt at most.
        ends: Tokens at which the continuation has to end.
        length: Tokens of the texts whose logits are compared.
        never: A file that code of the input would write.
    """

    model: Path
    reference: Callable[[], PreTrainedModel] | None = None
    base: Path | None = None
    recipe: Recipe | None = None
    context: int | None = None
    placed: Callable[[Path], Path] = lambda bundle: bundle
    prompt: tuple[int, ...] = ()
    new_tokens: int = 24
    ends: tuple[int, ...] = ()
    length: int = 24
    never: Path | None = None


Build = Callable[[Path], Given]


@dataclass(frozen=True)
class Case:
    """An input and what should become of it.

    Args:
        name: Its name in the results.
        given: What is brought, in one sentence.
        outcome: What should become of it.
        build: Writes it into a folder.
        command: The command that reads it.
    """

    name: str
    given: str
    outcome: Outcome
    build: Build
    command: Literal["export", "compress", "run"] = "export"


@dataclass(frozen=True)
class Row:
    """What became of a case.

    Args:
        case: Its name.
        input: What was brought.
        command: The command that read it.
        outcome: What became of it.
        error: Largest difference of a logit over the largest logit, against transformers; None if refused.
        tokens: Greedy tokens that are equal to transformers'; None where none were compared.
        message: A refusal's first line, or what was said aloud about the input; paths are left out.
    """

    case: str
    input: str
    command: str
    outcome: str
    error: float | None
    tokens: int | None
    message: str


def run_case(case: Case, folder: Path) -> Row:
    """Make an input in an empty folder, read it, and compare what comes out with transformers.

    Raises:
        AssertionError: Greedy tokens differ, or code that the input brings was run.
    """
    row = Row(case.name, case.given, case.command, "refused", None, None, "")
    with patch("rk_export.source.gguf.convert.CACHE", folder / "cache"):
        given = case.build(folder)
        try:
            report = _run(case.command, given, folder / "bundle")
            session = Session.from_pretrained(
                given.placed(folder / "bundle"), provider="cpu", threads=1, accuracy_level=0
            )
            ours = _continued(session, given)
        except RkExportError as refusal:
            row = replace(row, message=_plain(str(refusal).splitlines()[0], given, folder))
        else:
            said = " ".join(_about_the_input(report) if given.reference else _passed_tiers(report))
            row = replace(row, outcome=outcome_of(report, given.model), message=_plain(said, given, folder))
            if given.reference is not None:
                row = replace(row, **_compared(session, given, given.reference(), ours))
    assert given.never is None or not given.never.exists(), f"{case.name}: code of the input was run"
    return row


def _run(command: str, given: Given, out: Path) -> Report:
    if command == "compress":
        return compress(given.model, out, given.recipe, base=given.base, run=Run(threads=1))
    return export(given.model, out, context_length=given.context, base=given.base, run=Run(threads=1))


def outcome_of(report: Report, model: Path) -> Outcome:
    """Return what a report says was done to the tensors of a model."""
    passes = {(finding.details or {}).get("pass") for finding in report.findings}
    if "carry" in passes:
        return "carried"
    if "merge" in passes:
        return "merged"
    if "dequantize" in passes or _quantized_gguf(model):
        return "dequantized"
    return "read"


def _quantized_gguf(path: Path) -> bool:
    if path.suffix != ".gguf":
        return False
    from gguf import GGMLQuantizationType, GGUFReader

    floats = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16}
    return any(tensor.tensor_type not in floats for tensor in GGUFReader(path).tensors)


def _about_the_input(report: Report) -> list[str]:
    """Return the notices without the one that every export in floats has."""
    found = [finding.details["notice"] for finding in report.findings if "notice" in (finding.details or {})]
    found += [notice for notice in report.notices if not notice.startswith("spectra:")]
    return list(dict.fromkeys(found))


def _passed_tiers(report: Report) -> list[str]:
    passed = [tier.tier for tier in report.parity if tier.passed]
    return [f"Tiers {', '.join(dict.fromkeys(passed))} of parity passed."]


def _continued(session: Session, given: Given) -> list[int]:
    if not given.prompt:
        return []
    options = GenerationOptions(max_new_tokens=given.new_tokens)
    return list(session.generate([list(given.prompt)], options=options)[0].token_ids)


def _compared(session: Session, given: Given, model: PreTrainedModel, ours: Sequence[int]) -> dict[str, Any]:
    tokens = None
    if given.prompt:
        theirs = _theirs(model, given)
        assert list(ours) == theirs, f"tokens {list(ours)} instead of transformers' {theirs}"
        tokens = len(theirs)
    return {"error": largest_error(session, model, given.length), "tokens": tokens}


def _theirs(model: PreTrainedModel, given: Given) -> list[int]:
    """Return transformers' greedy tokens, cut behind the first end."""
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([given.prompt])
    made = model.generate(prompt, max_new_tokens=given.new_tokens, do_sample=False, pad_token_id=0)
    tokens = [int(token) for token in made[0, len(given.prompt) :]]
    last = next((place for place, token in enumerate(tokens) if token in given.ends), len(tokens) - 1)
    return tokens[: last + 1]


def largest_error(session: Session, model: PreTrainedModel, length: int) -> float:
    """Return the largest difference of logits of two random texts, relative to the largest logit."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.get_text_config().vocab_size, (TEXTS, length), generator=generator)
    with torch.no_grad():
        expected = model(input_ids=ids).logits.float().numpy()
    found = session.prefill_logits(ids.numpy())
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _plain(text: str, given: Given, folder: Path) -> str:
    """Return a message without the temporary paths in it."""
    names = {str(given.model): "MODEL", str(folder / "bundle"): "BUNDLE"}
    if given.base is not None:
        names[str(given.base)] = "BASE"
    names |= {str(given.model.parent): "FOLDER", str(folder): "FOLDER"}
    for path in sorted(names, key=len, reverse=True):
        text = text.replace(path, names[path])
    return text

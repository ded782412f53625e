"""Bundles of text models inside models that read images: the tokens of the whole model, in every runtime.

A sample of the wrappers; all of them with ``RK_FAMILIES=all``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, trained_tokenizer
from genai_tokens import genai_tokens, our_tokens
from tiny_wrappers import WRAPPERS, edit_json, tiny_wrapper
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rk_export import Run, export, verify
from rk_export.report.records import Report
from rk_export.runtime import Session
from rk_export.runtime.ends import read_ends

pytestmark = pytest.mark.whole

SAMPLE = ("gemma3", "aya_vision", "qwen2_5_vl", "smolvlm")
BUNDLED = tuple(WRAPPERS) if os.environ.get("RK_FAMILIES") == "all" else SAMPLE
NEW_TOKENS = 32
PROMPTS = [[5, 9, 30, 12], list(range(40, 75)), [7] * 11]


def greedy(model: PreTrainedModel, prompt: list[int], ends: set[int]) -> list[int]:
    """Continue a prompt by the whole model without a cache."""
    ids = list(prompt)
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[PreTrainedModel, Path, Path]]:
    """Return a function from a wrapper's name to the model, its folder and the bundle made of that."""
    made: dict[str, tuple[PreTrainedModel, Path, Path]] = {}

    def of(name: str) -> tuple[PreTrainedModel, Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp("wrapper")
            text = {**WRAPPERS[name]["text_config"], "vocab_size": VOCABULARY}
            model = tiny_wrapper(name, text_config=text)
            model.save_pretrained(folder / "model")
            trained_tokenizer().save_pretrained(folder / "model")
            export(folder / "model", folder / "out", run=Run(threads=1))
            made[name] = (model, folder / "model", folder / "out")
        return made[name]

    return of


@pytest.mark.parametrize("name", BUNDLED)
def test_tokens_are_those_of_the_whole_model(
    name: str, exported: Callable[[str], tuple[PreTrainedModel, Path, Path]]
) -> None:
    model, _, bundle = exported(name)
    expected = [greedy(model, prompt, set(read_ends(bundle).ids)) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) > 1, "one text for every prompt would prove nothing"
    assert our_tokens(bundle, PROMPTS, NEW_TOKENS) == expected
    assert genai_tokens(bundle, PROMPTS, NEW_TOKENS) == expected


def test_logits_and_files_are_those_of_a_text_model(
    exported: Callable[[str], tuple[PreTrainedModel, Path, Path]],
) -> None:
    model, folder, bundle = exported("qwen2_5_vl")
    ids = np.arange(3, 43, dtype=np.int64)[None]
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    found = Session.from_pretrained(bundle, provider="cpu", threads=1).prefill_logits(ids)
    assert np.abs(np.asarray(found) - expected).max() <= 1e-5 * np.abs(expected).max()
    config = AutoConfig.from_pretrained(bundle)
    assert (config.model_type, config.architectures) == ("qwen2", ["Qwen2ForCausalLM"])
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config)
    assert json.loads((bundle / "genai_config.json").read_text())["model"]["type"] == "qwen2"
    assert (bundle / "chat_template.jinja").read_text() == (folder / "chat_template.jinja").read_text()
    report = Report.load(bundle / "report.json")
    assert any("qwen2_5_vl" in notice and "left out" in notice for notice in report.notices)
    assert report.parity[0].note == "Qwen2_5_VLForConditionalGeneration.from_pretrained"
    assert all(tier.passed for tier in verify(bundle, against=folder) if tier.passed is not None)


def test_ends_are_those_of_the_whole_model(tmp_path: Path) -> None:
    text = {**WRAPPERS["llava"]["text_config"], "vocab_size": VOCABULARY, "eos_token_id": 7}
    tiny_wrapper("llava", text_config=text).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").unlink()
    edit_json(tmp_path / "model" / "config.json", eos_token_id=[2, 9])
    trained_tokenizer().save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", run=Run(threads=1))
    assert read_ends(tmp_path / "out").ids == (2, 9)

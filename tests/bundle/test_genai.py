"""A bundle in ONNX Runtime GenAI, unchanged: the same greedy tokens as in our own runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import tiny_options
from genai_tokens import engine_tokens, genai_tokens, generator_tokens, our_tokens
from tiny_models import tiny_model

from rk_export import compress
from rk_export.options.run import Run
from rk_export.parity.probe import make_probe

pytest.importorskip("onnxruntime_genai", reason="needs the extra: pip install 'rk-export[genai]'")

pytestmark = pytest.mark.whole

Together = Callable[[Path, Sequence[Sequence[int]], int], list[list[int]]]

NEW_TOKENS = 24
FAMILIES = ("mistral", "qwen2", "qwen3", "phi3", "gemma2", "granite", "smollm3", "starcoder2", "opt", "gpt2")


def prompts_of(bundle: Path, vocabulary: int) -> list[list[int]]:
    return [list(prompt) for prompt in make_probe(bundle, vocabulary).prompts[:4]]


def test_tiny_bundle(bundle: Path) -> None:
    prompts = prompts_of(bundle, 320)
    ours = our_tokens(bundle, prompts, NEW_TOKENS)
    assert len({tuple(row) for row in ours}) > 1, "one text for every prompt would prove nothing"
    assert genai_tokens(bundle, prompts, NEW_TOKENS) == ours


@pytest.mark.parametrize("together", [generator_tokens, engine_tokens])
def test_unequal_prompts_together_get_the_tokens_of_each_alone(bundle: Path, together: Together) -> None:
    prompts = [prompt[:length] for prompt, length in zip(prompts_of(bundle, 320), (14, 5, 9, 2), strict=True)]
    alone = our_tokens(bundle, prompts, NEW_TOKENS)
    assert sum(map(len, alone)) > 2 * NEW_TOKENS, "texts that end at once would prove nothing"
    found = together(bundle, prompts, NEW_TOKENS)
    assert [row[: len(wanted)] for row, wanted in zip(found, alone, strict=True)] == alone


@pytest.mark.real_model
def test_smollm2_in_int4(smollm2_int4: Path) -> None:
    prompts = [list(prompt) for prompt in make_probe(smollm2_int4, 49152).prompts]
    ours = our_tokens(smollm2_int4, prompts, 64)
    assert genai_tokens(smollm2_int4, prompts, 64) == ours
    assert sum(map(len, ours)) > 256, "most prompts go on for long"


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", tmp_path / "out", tiny_options(groups=("qk",)), run=Run(threads=1))
    prompts = prompts_of(tmp_path / "out", 160)
    assert genai_tokens(tmp_path / "out", prompts, NEW_TOKENS) == our_tokens(
        tmp_path / "out", prompts, NEW_TOKENS
    )

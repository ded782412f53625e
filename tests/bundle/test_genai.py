"""A bundle in ONNX Runtime GenAI: the same greedy tokens as in our own runtime, alone and beside other requests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import onnx
import pytest
from conftest import tiny_options
from genai_tokens import (
    engine_tokens,
    genai_tokens,
    generator_texts,
    generator_tokens,
    late_engine_tokens,
    our_tokens,
)
from tiny_models import tiny_config, tiny_model

from rk_export import compress
from rk_export.bundle.genai import genai_config, write_genai_config
from rk_export.options.run import Run
from rk_export.parity.probe import make_probe

onnxruntime_genai = pytest.importorskip(
    "onnxruntime_genai", reason="needs the extra: pip install 'rk-export[genai]'"
)

pytestmark = pytest.mark.whole

Together = Callable[[Path, Sequence[Sequence[int]], int], list[list[int]]]

Int4Of = Callable[[str], tuple[Path, list[list[int]], list[list[int]]]]

NEW_TOKENS = 24
UNEQUAL = (14, 5, 9, 2)
TOGETHER = ("llama", "qwen2", "qwen3", "gemma2", "gpt2")
ENDED = {0, 2}  # the ids of padding and end of text
FAMILIES = ("mistral", "qwen2", "qwen3", "phi3", "gemma2", "granite", "smollm3", "starcoder2", "opt", "gpt2")


@pytest.fixture(scope="module")
def int8_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `bundle` in which every product reads int8 numbers."""
    folder = Path(shutil.copytree(bundle, tmp_path_factory.mktemp("int8") / "bundle"))
    all_read_int8(folder)
    return folder


@pytest.fixture(scope="module")
def int4_of(tmp_path_factory: pytest.TempPathFactory) -> Int4Of:
    """Return a function from a family to its bundle in INT4, unequal prompts and our tokens; made once."""

    @cache
    def made(family: str) -> tuple[Path, list[list[int]], list[list[int]]]:
        folder = tmp_path_factory.mktemp(family)
        tiny_model(family).save_pretrained(folder / "model")
        compress(folder / "model", folder / "out", tiny_options(groups=()), run=Run(threads=1))
        all_read_int8(folder / "out")
        prompts = [
            prompt[:length] for prompt in prompts_of(folder / "out", 160) for length in (prompt[0] % 5 + 2, 9)
        ]
        return folder / "out", prompts, our_tokens(folder / "out", prompts, NEW_TOKENS)

    return made


def all_read_int8(bundle: Path) -> None:
    """Set the accuracy level of all products with quantized weights to 4: these round in a batch as they do alone.

    Random weights make some products read floats (level 1), which another kernel computes for one row than for
    several. The last bit then depends on who runs how many rows, and a tiny model's tokens hang on it.
    """
    graph = bundle / "model.onnx"
    model = onnx.load(graph, load_external_data=False)
    attributes = [attribute for node in model.graph.node for attribute in node.attribute]
    levels = [attribute for attribute in attributes if attribute.name == "accuracy_level"]
    assert 4 in {attribute.i for attribute in levels}
    for attribute in levels:
        attribute.i = 4
    onnx.save(model, graph)


def trimmed(found: list[list[int]], wanted: list[list[int]], ended: set[int] = ENDED) -> list[list[int]]:
    """Return rows without what a `Generator` writes behind an ended row while others go on: padding."""
    assert all(set(row[len(alone) :]) <= ended for row, alone in zip(found, wanted, strict=True))
    return [row[: len(alone)] for row, alone in zip(found, wanted, strict=True)]


def prompts_of(bundle: Path, vocabulary: int) -> list[list[int]]:
    return [list(prompt) for prompt in make_probe(bundle, vocabulary).prompts[:4]]


def test_tiny_bundle(int8_bundle: Path) -> None:
    prompts = prompts_of(int8_bundle, 320)
    ours = our_tokens(int8_bundle, prompts, NEW_TOKENS)
    assert len({tuple(row) for row in ours}) > 1, "one text for every prompt would prove nothing"
    assert genai_tokens(int8_bundle, prompts, NEW_TOKENS) == ours


@pytest.mark.parametrize("together", [generator_tokens, engine_tokens])
def test_unequal_prompts_together_get_the_tokens_of_each_alone(int8_bundle: Path, together: Together) -> None:
    prompts = [prompt[:length] for prompt, length in zip(prompts_of(int8_bundle, 320), UNEQUAL, strict=True)]
    alone = our_tokens(int8_bundle, prompts, NEW_TOKENS)
    assert sum(map(len, alone)) > 2 * NEW_TOKENS, "texts that end at once would prove nothing"
    assert trimmed(together(int8_bundle, prompts, NEW_TOKENS), alone) == alone


def test_texts_that_genai_encodes_and_pads_itself(int8_bundle: Path) -> None:
    texts = [
        "The train leaves",
        "Add the salt, fold the dough, and",
        "The committee met on Tuesday to discuss",
    ]
    prompts, found = generator_texts(int8_bundle, texts, NEW_TOKENS)
    assert len({len(prompt) for prompt in prompts}) == 3
    alone = our_tokens(int8_bundle, prompts, NEW_TOKENS)
    assert trimmed(found, alone) == alone


@pytest.mark.parametrize("together", [generator_tokens, engine_tokens, late_engine_tokens])
@pytest.mark.parametrize("family", TOGETHER)
def test_families_together(family: str, int4_of: Int4Of, together: Together) -> None:
    """Eight prompts, as shipped; GenAI's engine runs four requests at once on the CPU, and the others wait."""
    folder, prompts, alone = int4_of(family)
    assert len({tuple(row) for row in alone}) > 4, "one text for every prompt would prove nothing"
    assert trimmed(together(folder, prompts, NEW_TOKENS), alone) == alone


@pytest.mark.parametrize("kernel", ["0", "1"])
def test_the_settings_for_cuda_are_ones_that_genai_reads(tmp_path: Path, kernel: str) -> None:
    """No CUDA device is needed to read them: a model is what needs one."""
    write_genai_config(tmp_path, genai_config(tiny_config("qwen2"), ep="cuda", context_length=128))
    config = onnxruntime_genai.Config(str(tmp_path))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"ep.cuda.fpa_intb_gemm": kernel}}}}))
    config.set_provider_option("cuda", "enable_cuda_graph", "1")


def test_genai_refuses_a_number_as_a_setting_for_cuda(tmp_path: Path) -> None:
    values = genai_config(tiny_config("qwen2"), ep="cuda", context_length=128)
    values["model"]["decoder"]["session_options"]["provider_options"][0]["cuda"]["enable_cuda_graph"] = 0
    write_genai_config(tmp_path, values)
    with pytest.raises(RuntimeError, match="enable_cuda_graph - Expected a string"):
        onnxruntime_genai.Config(str(tmp_path))


@pytest.mark.real_model
def test_smollm2_in_int4(smollm2_int4: Path) -> None:
    prompts = [list(prompt) for prompt in make_probe(smollm2_int4, 49152).prompts]
    ours = our_tokens(smollm2_int4, prompts, 64)
    assert genai_tokens(smollm2_int4, prompts, 64) == ours
    assert sum(map(len, ours)) > 256, "most prompts go on for long"
    unequal = [prompt[: 2 + 3 * index] for index, prompt in enumerate(prompts)]
    alone = our_tokens(smollm2_int4, unequal, 48)
    for together in (generator_tokens, engine_tokens, late_engine_tokens):
        assert trimmed(together(smollm2_int4, unequal, 48), alone, {2}) == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    compress(tmp_path / "model", tmp_path / "out", tiny_options(groups=("qk",)), run=Run(threads=1))
    all_read_int8(tmp_path / "out")
    prompts = prompts_of(tmp_path / "out", 160)
    assert genai_tokens(tmp_path / "out", prompts, NEW_TOKENS) == our_tokens(
        tmp_path / "out", prompts, NEW_TOKENS
    )

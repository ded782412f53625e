"""A bundle in Optimum's ORTModelForCausalLM, against plain ONNX Runtime on the same file.

Runs in an environment of its own (``make test-optimum``), since optimum-onnx pins older transformers. The
bundle is the folder named by the environment variable RK_BUNDLE.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported
pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx: run `make test-optimum`")

import onnx
import onnxruntime as ort
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

PROMPT = "The capital of France is"
PROMPTS = [PROMPT, "Once upon a time, in a small village far away from the sea, there lived"]
NEW_TOKENS = 12

# Padding shifts the rotary positions, which changes the rounding and nothing else. Largest logit difference
# over the largest logit; 2.7e-5 was measured on SmolLM2-135M in 4 bits at accuracy level 0.
PADDING_TOLERANCE = 2e-4


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    options.log_severity_level = 3
    return options


@pytest.fixture(scope="module")
def bundle() -> Path:
    folder = os.environ.get("RK_BUNDLE")
    assert folder, "set RK_BUNDLE to the folder of a bundle"
    assert (Path(folder) / "model.onnx").is_file(), f"{folder} is no bundle"
    return Path(folder)


@pytest.fixture(scope="module")
def exact_bundle(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the bundle with float activations: at accuracy level 4 rounding hides what padding does."""
    folder = tmp_path_factory.mktemp("exact") / "bundle"
    shutil.copytree(bundle, folder, ignore=shutil.ignore_patterns("triton"))
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(graph, folder / "model.onnx")
    return folder


@pytest.fixture(scope="module")
def tokenizer(bundle: Path) -> Any:
    return AutoTokenizer.from_pretrained(bundle, padding_side="left", trust_remote_code=False)


def _model(folder: Path) -> Any:
    return ORTModelForCausalLM.from_pretrained(folder, session_options=_options(), trust_remote_code=False)


def _session(folder: Path) -> Any:
    return ort.InferenceSession(folder / "model.onnx", _options(), providers=["CPUExecutionProvider"])


def _run(session: Any, ids: list[int], past: dict[str, Any], length: int) -> tuple[Any, dict[str, Any]]:
    """Feed tokens after ``length`` cached ones; return logits (1, tokens, vocabulary) and the new cache."""
    feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, length + len(ids)), np.int64)}
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, {**feed, **past}), strict=True))
    logits = outputs.pop("logits")
    return logits, {name.replace("present", "past_key_values"): value for name, value in outputs.items()}


def _empty_past(session: Any) -> dict[str, Any]:
    pasts = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]
    assert pasts
    return {value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32) for value in pasts}


def _greedy_reference(session: Any, ids: list[int]) -> list[int]:
    """Return NEW_TOKENS greedy tokens, computed with the cache and no end token."""
    new, past, length = ids, _empty_past(session), 0
    tokens: list[int] = []
    for _ in range(NEW_TOKENS):
        logits, past = _run(session, new, past, length)
        length += len(new)
        new = [int(logits[0, -1].argmax())]
        tokens += new
    return tokens


def _greedy(model: Any, inputs: Any) -> list[list[int]]:
    """Return NEW_TOKENS greedy tokens a row, with no end token and none of the bundle's sampling defaults."""
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
    tokens = model.generate(**inputs, generation_config=config, use_model_defaults=False)
    return [row[inputs["input_ids"].shape[1] :] for row in tokens.tolist()]


def _encode(tokenizer: Any, prompts: list[str]) -> Any:
    return tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False)


def test_tokenizer_makes_what_the_graph_takes(tokenizer: Any) -> None:
    assert set(tokenizer(PROMPT)) == {"input_ids", "attention_mask"}


def test_logits_equal_those_of_onnxruntime(bundle: Path, tokenizer: Any) -> None:
    session = _session(bundle)
    inputs = _encode(tokenizer, [PROMPT])
    expected, _ = _run(session, inputs["input_ids"][0].tolist(), _empty_past(session), 0)
    with torch.no_grad():
        logits = _model(bundle)(**inputs).logits.numpy()
    np.testing.assert_array_equal(logits, expected)


def test_greedy_tokens_equal_those_of_onnxruntime(bundle: Path, tokenizer: Any) -> None:
    inputs = _encode(tokenizer, [PROMPT])
    expected = _greedy_reference(_session(bundle), inputs["input_ids"][0].tolist())
    assert _greedy(_model(bundle), inputs) == [expected]


def test_left_padding_leaves_logits_as_they_are(exact_bundle: Path, tokenizer: Any) -> None:
    session = _session(exact_bundle)
    batch = _encode(tokenizer, PROMPTS)
    assert (batch["attention_mask"][0] == 0).any()
    with torch.no_grad():
        logits = _model(exact_bundle)(**batch).logits.numpy()
    for row, prompt in zip(logits, PROMPTS, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        expected, _ = _run(session, ids, _empty_past(session), 0)
        error = np.abs(row[-len(ids) :] - expected[0]).max() / np.abs(expected).max()
        assert error < PADDING_TOLERANCE


def test_left_padded_batch_generates_the_tokens_of_each_row(exact_bundle: Path, tokenizer: Any) -> None:
    session = _session(exact_bundle)
    expected = [_greedy_reference(session, tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert _greedy(_model(exact_bundle), _encode(tokenizer, PROMPTS)) == expected

"""Encoder bundles in Optimum's ORTModel classes: hidden states, and the logits of classifiers, as our runtime gives.

Runs in an environment of its own (``make test-optimum``). The environment variable RK_BUNDLES names a folder that
`tests/sentence_bundles.py` wrote in the main environment.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported
pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx: run `make test-optimum`")

import onnxruntime as ort
import torch
from optimum.onnxruntime import (
    ORTModelForFeatureExtraction,
    ORTModelForSequenceClassification,
    ORTModelForTokenClassification,
)
from transformers import AutoTokenizer

ROUNDED = 1e-2  # of the largest: other sums may round int8 inputs to the other side


def _folder(name: str) -> Path:
    made = os.environ.get("RK_BUNDLES")
    assert made, "set RK_BUNDLES to the folder that tests/sentence_bundles.py wrote"
    return Path(made) / name


def _expected(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((_folder(name) / "expected.json").read_text(encoding="utf-8"))
    return values


def _opened(kind: Any, name: str, bundle: str) -> tuple[Any, Any]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    folder = _folder(name) / bundle
    model = kind.from_pretrained(folder, session_options=options, trust_remote_code=False)
    return model, AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _close(found: Any, expected: Any, tolerance: float) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_hidden_states_pool_to_our_vectors(family: str) -> None:
    """Bert pools the mean and roberta the first token; both scale to length 1."""
    expected = _expected(family)
    model, tokenizer = _opened(ORTModelForFeatureExtraction, family, "floats")
    inputs = tokenizer(expected["texts"], padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state.numpy()
    mask = inputs["attention_mask"].numpy()[..., None]
    pooled = (states * mask).sum(1) / mask.sum(1) if family == "bert" else states[:, 0]
    _close(pooled / np.linalg.norm(pooled, axis=1, keepdims=True), expected["floats"], 2e-5)


@pytest.mark.parametrize("name", ["cross_encoder", "classifier"])
def test_classifiers_of_pairs_give_our_logits(name: str) -> None:
    expected = _expected(name)
    texts = expected["texts"]
    model, tokenizer = _opened(ORTModelForSequenceClassification, name, "int4")
    inputs = tokenizer([texts[0]] * len(texts), texts, padding=True, return_tensors="pt")
    assert "token_type_ids" in inputs
    with torch.no_grad():
        _close(model(**inputs).logits.numpy(), expected["logits"], ROUNDED)
    labels = [str(index) for index in range(len(expected["logits"][0]))]
    assert list(map(str, model.config.id2label)) == labels


def test_classifiers_of_tokens_give_our_logits() -> None:
    expected = _expected("tagger")
    model, tokenizer = _opened(ORTModelForTokenClassification, "tagger", "int4")
    assert list(model.config.id2label.values()) == ["harbour", "bread", "train"]
    for text, logits in zip(expected["texts"], expected["logits"], strict=True):
        with torch.no_grad():
            found = model(**tokenizer([text], return_tensors="pt")).logits[0].numpy()
        _close(found, logits, ROUNDED)

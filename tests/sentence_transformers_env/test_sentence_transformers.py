"""Bundles in sentence-transformers with its ONNX backend: our vectors, and those of its own PyTorch model.

Runs in an environment of its own (``make test-sentence-transformers``). The environment variable RK_BUNDLES names a
folder that `tests/sentence_bundles.py` wrote in the main environment.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip(
    "sentence_transformers", reason="needs sentence-transformers: run `make test-sentence-transformers`"
)

import onnxruntime as ort
from sentence_transformers import CrossEncoder, SentenceTransformer

FAMILIES = ("bert", "roberta", "modernbert", "mpnet")
# The transformers that is installed here reads other fields for ModernBERT's rotation than the one that wrote it.
READ_ALIKE = ("bert", "roberta", "mpnet")
CLASSIFIERS = ("cross_encoder", "classifier")
CLOSE = 2e-5  # of the largest element


@dataclass(frozen=True)
class Case:
    """A model with its bundles, and what our runtime makes of its texts."""

    folder: Path
    expected: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        return list(self.expected["texts"])


def _case(name: str) -> Case:
    made = os.environ.get("RK_BUNDLES")
    assert made, "set RK_BUNDLES to the folder that tests/sentence_bundles.py wrote"
    folder = Path(made) / name
    return Case(folder, json.loads((folder / "expected.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


@pytest.fixture(scope="module", params=CLASSIFIERS)
def classifier(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _opened(folder: Path, kind: Any = SentenceTransformer) -> Any:
    kwargs = {"session_options": _options(), "provider": "CPUExecutionProvider"}
    return kind(str(folder), backend="onnx", device="cpu", model_kwargs=kwargs, local_files_only=True)


def _same(found: Any, expected: Any, tolerance: float = CLOSE) -> None:
    found, expected = np.asarray(found, np.float32), np.asarray(expected, np.float32)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("family", READ_ALIKE)
def test_vectors_are_those_of_its_own_model(family: str) -> None:
    """The reference is no code of ours: PyTorch, with the pooling and the modules of sentence-transformers."""
    case = _case(family)
    own = SentenceTransformer(str(case.folder / "model"), device="cpu", local_files_only=True)
    vectors = own.encode(case.texts)
    _same(_opened(case.folder / "floats").encode(case.texts), vectors)
    _same(case.expected["floats"], vectors)
    queries = own.encode(case.texts, prompt_name="query")
    _same(case.expected["floats_queries"], queries)
    assert np.abs(queries - vectors).max() > 0.01


@pytest.mark.parametrize("name", ["floats", "int4"])
def test_vectors_are_our_runtimes(case: Case, name: str) -> None:
    """A bundle opens as the folder it is; texts are cut, prompted and pooled as in our runtime."""
    model = _opened(case.folder / name)
    assert model.max_seq_length == 16
    # Texts in a batch of int8 inputs are rounded a token at a time: padding changes nothing but the order of sums.
    tolerance = CLOSE if name == "floats" else 1e-2
    _same(model.encode(case.texts), case.expected[name], tolerance)
    _same(model.encode(case.texts, prompt_name="query"), case.expected[f"{name}_queries"], tolerance)


def test_the_bundle_compresses(case: Case) -> None:
    """Else the two above would compare one model with itself."""
    lost = np.abs(np.array(case.expected["int4"]) - np.array(case.expected["floats"]))
    assert lost.max() > 1e-3


def test_a_bundle_with_files_for_servers_opens_too(case: Case, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(case.folder / "floats", tmp_path / "bundle"))
    place = folder / "triton" / "bundle" / "1" / "model.onnx"
    place.mkdir(parents=True)
    for name in ("model.onnx", "model.onnx.data"):
        shutil.copyfile(folder / name, place / name)
    _same(_opened(folder).encode(case.texts), case.expected["floats"])


def test_scores_of_cross_encoders(classifier: Case) -> None:
    pairs = [(classifier.texts[0], text) for text in classifier.texts]
    model = _opened(classifier.folder / "int4", CrossEncoder)
    one_label = len(classifier.expected["scores"][0]) == 1
    scores = model.predict(pairs, apply_softmax=not one_label)
    expected = np.array(classifier.expected["scores"])
    _same(scores, expected[:, 0] if one_label else expected, 1e-2)
    ranked = model.rank(classifier.texts[0], classifier.texts) if one_label else []
    assert [item["corpus_id"] for item in ranked] == (
        np.argsort(-expected[:, 0]).tolist() if one_label else []
    )

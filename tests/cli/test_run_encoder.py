"""`rk-export run` with encoders: a vector, labels of a text or a pair, labels of tokens."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Cli
from encoder_bundles import write_classifier, write_embedding_model

from rk_export.runtime import Encoder

CPU = ("--provider", "cpu", "--threads", 1)


def test_the_vector_of_a_text(cli: Cli, tmp_path: Path) -> None:
    bundle = write_embedding_model(tmp_path / "out")
    (expected,) = Encoder(bundle, provider="cpu", threads=1).encode(["harbour"])
    found = cli("run", bundle, "-p", "harbour", "--json", *CPU)
    np.testing.assert_allclose(json.loads(found.out)["embedding"], expected, atol=1e-6)
    plain = cli("run", bundle, "-p", "harbour", *CPU).out
    assert plain == f"8 numbers, all with --json: {' '.join(f'{value:.4f}' for value in expected)}\n"


def test_labels_of_a_pair(cli: Cli, tmp_path: Path) -> None:
    bundle = write_classifier(tmp_path / "out")
    (expected,) = Encoder(bundle, provider="cpu", threads=1).classify([("quay", "mast")])
    found = json.loads(cli("run", bundle, "-p", "quay", "--pair", "mast", "--json", *CPU).out)
    assert found["label"] == expected.label
    np.testing.assert_allclose(list(found["scores"].values()), expected.scores, atol=1e-6)
    lines = cli("run", bundle, "-p", "quay", "--pair", "mast", *CPU).out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(
        found["scores"], key=lambda one: -found["scores"][one]
    )
    alone = json.loads(cli("run", bundle, "-p", "quay", "--json", *CPU).out)
    assert alone["scores"] != found["scores"]


def test_labels_of_tokens(cli: Cli, tmp_path: Path) -> None:
    bundle = write_classifier(tmp_path / "out", by_token=True)
    (expected,) = Encoder(bundle, provider="cpu", threads=1).tag(["abc"])
    found = json.loads(cli("run", bundle, "-p", "abc", "--json", *CPU).out)["tokens"]
    assert [one["label"] for one in found] == [one.label for one in expected]
    lines = cli("run", bundle, "-p", "abc", *CPU).out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [letter, one.label] for letter, one in zip("abc", expected, strict=True)
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "an encoder does not chat"),
        (("-p", "a", "--pair", "b"), "--pair: goes with classifiers"),
        (("-p", "a", "--chat"), "--chat: goes with models that continue texts"),
        (("-p", "a", "--max-new-tokens", 4), "--max-new-tokens: goes with"),
        (("-p", "a", "--stop", "x"), "--stop: goes with"),
    ],
)
def test_what_an_encoder_cannot_do(cli: Cli, tmp_path: Path, words: tuple[object, ...], told: str) -> None:
    ended = cli("run", write_embedding_model(tmp_path / "out"), *words, *CPU)
    assert (ended.code, ended.out) == (2, "")
    assert told in ended.err


def test_a_classifier_of_tokens_takes_no_pair(cli: Cli, tmp_path: Path) -> None:
    ended = cli("run", write_classifier(tmp_path / "out", by_token=True), "-p", "a", "--pair", "b", *CPU)
    assert ended.code == 2
    assert "labels the tokens of one text" in ended.err

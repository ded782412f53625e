"""Tokens that a model has no row for, and more of them than it has positions: refused on every road."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, Cli, trained_tokenizer
from runtime_models import CONTEXT, VOCAB, TinyDecoder, write_encoder
from tiny_models import tiny_model

from rk_export import export
from rk_export.errors import InputError
from rk_export.evaluation.measure import SpeedTest
from rk_export.model.torch_logits import torch_logits
from rk_export.options.run import Run
from rk_export.runtime import BundleContestant, EncoderSession, Session, bench
from rk_export.runtime.token_gate import TokenGate

EXTRA = "<|extra|>"


@pytest.fixture(scope="module")
def extended(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokenizer has a token without a row in the embedding, as after `add_tokens`."""
    folder = Path(shutil.copytree(llama, tmp_path_factory.mktemp("extended") / "model"))
    tokenizer = trained_tokenizer()
    tokenizer.add_tokens([f"<|filler {index}|>" for index in range(VOCABULARY - len(tokenizer))])
    tokenizer.add_tokens([EXTRA])
    assert tokenizer.convert_tokens_to_ids(EXTRA) == VOCABULARY
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def extended_bundle(extended: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "extended"
    export(extended, folder, run=Run(threads=1))
    return folder


@pytest.fixture
def strange_text(tmp_path: Path) -> Path:
    path = tmp_path / "strange.txt"
    path.write_text(f"The harbour was quiet. {EXTRA} and the gulls moved. " * 60, encoding="utf-8")
    return path


@pytest.mark.whole
def test_export_says_which_tokens_have_no_row(extended_bundle: Path) -> None:
    report = json.loads((extended_bundle / "report.json").read_text(encoding="utf-8"))
    (notice,) = (notice for notice in report["notices"] if "no row" in notice)
    assert f"embedding of {VOCABULARY}" in notice
    assert notice.endswith(f"1, namely '{EXTRA}' ({VOCABULARY})")


@pytest.mark.whole
def test_export_says_nothing_where_all_have(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text(encoding="utf-8"))
    assert not any("no row" in notice for notice in report["notices"])


@pytest.mark.whole
def test_commands_name_the_token(cli: Cli, extended: Path, extended_bundle: Path, strange_text: Path) -> None:
    named = f"token {VOCABULARY} ('{EXTRA}') is outside the model's vocabulary of {VOCABULARY}"
    for arguments in (
        ("run", extended_bundle, "-p", f"quiet {EXTRA}", "--provider", "cpu"),
        ("run", extended_bundle, "-p", f"quiet {EXTRA}", "--chat", "--provider", "cpu"),
        ("eval", extended_bundle, "--text", strange_text, "--context", 32, "--provider", "cpu"),
        ("eval", extended, "--text", strange_text, "--context", 32),
        (
            *("compress", extended, "-o", strange_text.parent / "out"),
            *("--set", f"calibration.text={strange_text}", "--set", "calibration.tokens=512"),
        ),
    ):
        ended = cli(*arguments)
        assert ended.code == 2, arguments
        assert named in ended.err
        assert "Traceback" not in ended.err
    assert not (strange_text.parent / "out").exists()


@pytest.mark.whole
def test_tasks_are_refused_too(cli: Cli, extended: Path, extended_bundle: Path, tmp_path: Path) -> None:
    item = {"context": f"Which {EXTRA}?", "choices": ["one", "two"], "gold": 0}
    (tmp_path / "strange.jsonl").write_text(json.dumps(item) + "\n", encoding="utf-8")
    for model in (extended, extended_bundle):
        ended = cli("eval", model, "--tasks", tmp_path / "strange.jsonl", "--provider", "cpu")
        assert ended.code == 2, ended.err
        assert f"token {VOCABULARY} ('{EXTRA}') is outside" in ended.err


def test_a_tokenizer_of_another_model_is_refused_before_any_work(cli: Cli, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=100).save_pretrained(tmp_path / "model")
    trained_tokenizer().save_pretrained(tmp_path / "model")
    ended = cli("compress", tmp_path / "model", "-o", tmp_path / "out")
    assert ended.code == 2
    assert f"{tmp_path / 'model' / 'tokenizer.json'}: token" in ended.err
    assert "outside the model's vocabulary of 100" in ended.err
    assert not (tmp_path / "out").exists()


BAD_IDS: dict[str, tuple[Any, str]] = {
    "beyond": ([[1, VOCAB]], f"token {VOCAB} is outside the model's vocabulary of {VOCAB}"),
    "negative": ([[1, -1]], "token id -1 is negative"),
    "floats": ([[1.0, 2.0]], "token ids are float64"),
    "none": ([[]], "has no tokens"),
    "too many": ([[1] * (CONTEXT + 1)], f"{CONTEXT + 1} positions do not fit into a context of {CONTEXT}"),
}
ROADS: dict[str, Callable[[Session, Any], object]] = {
    "forward": lambda session, ids: session.forward(np.array(ids)),
    "prefill_logits": lambda session, ids: session.prefill_logits(np.array(ids)),
    "generate": lambda session, ids: session.generate(ids),
    "generate one": lambda session, ids: session.generate(ids[0]),
    "stream": lambda session, ids: list(session.stream(ids[0])),
    "decoder": lambda session, ids: session.decoder(batch=1, capacity=8).prefill(np.array(ids)),
}


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = TinyDecoder().write(tmp_path_factory.mktemp("gate"), tokenizer=False)
    return Session.from_pretrained(folder, provider="cpu", threads=1)


@pytest.mark.parametrize("kind", BAD_IDS)
@pytest.mark.parametrize("road", ROADS)
def test_every_road_of_a_session(session: Session, road: str, kind: str) -> None:
    ids, message = BAD_IDS[kind]
    if kind == "too many" and "prefill" not in road and road != "forward":
        message = "leave no room in a context" if road != "decoder" else "do not fit into 8"
    if road == "generate one" and kind == "none":
        pytest.skip("an empty list is a batch without prompts")
    with pytest.raises(InputError, match=message):
        ROADS[road](session, ids)


def test_decoding_is_behind_the_gate(session: Session) -> None:
    decoder = session.decoder(batch=1, capacity=8)
    decoder.prefill(np.array([[1, 2]]))
    for token, message in ((VOCAB, "outside"), (-1, "negative")):
        with pytest.raises(InputError, match=message):
            decoder.step(np.array([token]))
    assert decoder.step(np.array([3])).shape == (1, VOCAB), "a refused token leaves the decoder as it was"
    with pytest.raises(InputError, match=f"capacity: {CONTEXT + 1} positions"):
        session.decoder(batch=1, capacity=CONTEXT + 1)


def test_cached_positions_count(session: Session) -> None:
    _, past = session.forward(np.ones((1, CONTEXT - 1), np.int64))
    _, full = session.forward(np.ones((1, 1), np.int64), past=past)
    with pytest.raises(InputError, match=f"{CONTEXT + 1} positions .*\n.*at most 0 tokens"):
        session.forward(np.ones((1, 1), np.int64), past=full)


@pytest.mark.whole
def test_rows_are_those_of_the_graph(tmp_path: Path, bundle: Path) -> None:
    """Whatever the config says: here it promises more. Quantized tables are found too."""
    folder = TinyDecoder().write(tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 10 * VOCAB}), encoding="utf-8")
    assert Session.from_pretrained(folder, provider="cpu").rows == VOCAB
    bench([folder], prompt_tokens=80, new_tokens=2, repeats=1, threads=1)
    shipped = Session.from_pretrained(bundle, provider="cpu", threads=1)
    assert shipped._facts.embedding_rows == VOCABULARY


def test_encoder(tmp_path: Path) -> None:
    encoder = EncoderSession.from_pretrained(write_encoder(tmp_path), provider="cpu")
    for ids, message in (([[VOCAB]], "outside"), ([[-1]], "negative"), ([[1] * 17], "context of 16")):
        with pytest.raises(InputError, match=message):
            encoder.forward(np.array(ids))


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_pytorch_models_have_the_same_gate(source_of: Callable[..., Any], family: str) -> None:
    logits = torch_logits(source_of(family).load())
    assert logits(np.array([[1, 159]])).shape[:2] == torch.Size([1, 2])
    for ids, message in (([[160]], "outside"), ([[-1]], "negative"), ([[1] * 129], "context of 128")):
        with pytest.raises(InputError, match=message):
            logits(np.array(ids))


@pytest.mark.whole
def test_bench_refuses_what_does_not_fit(cli: Cli, bundle: Path) -> None:
    ended = cli("bench", bundle, "--provider", "cpu")
    assert ended.code == 2
    assert "512 prompt tokens and 64 new ones do not fit into a context of 128" in ended.err
    assert "give at most 63 prompt tokens" in ended.err
    contestant = BundleContestant(bundle, threads=1)
    assert (contestant.vocab_size, contestant.max_length) == (VOCABULARY, 128)


@pytest.mark.parametrize("context", [2, 40, 320, 321, 4096])
def test_speed_test_fits_into_the_context(context: int, caplog: pytest.LogCaptureFixture) -> None:
    test = SpeedTest().within(context)
    assert test.prompt_tokens >= 1 <= test.new_tokens
    assert test.prompt_tokens + test.new_tokens < context or context == 2
    assert ("speed is measured on" in caplog.text) is (context < 321)


def test_gate_without_knowledge_refuses_what_is_never_right() -> None:
    TokenGate(None).check([[10**9]])
    with pytest.raises(InputError, match="negative"):
        TokenGate(None).check([-5])

"""Opening bundles, and plain forward passes on them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from runtime_models import CONTEXT, LAYERS, VOCAB, TinyDecoder, write_encoder

from rk_export.errors import InputError, ProviderError
from rk_export.runtime import EncoderSession, Session
from rk_export.runtime import providers as providers_module
from rk_export.runtime import session as session_module
from rk_export.runtime.providers import SessionSettings

FORMS = {
    "grouped": TinyDecoder(),
    "plain": TinyDecoder(grouped=False),
    "external": TinyDecoder(external=True),
}


def tokens(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(VOCAB, size=(batch, length))


@pytest.mark.parametrize("form", FORMS)
def test_cached_forward_equals_one_pass(tmp_path: Path, form: str) -> None:
    session = Session.from_pretrained(FORMS[form].write(tmp_path), provider="cpu")
    ids = tokens(2, 9)
    whole = session.prefill_logits(ids)
    first, past = session.forward(ids[:, :5])
    rest = [first]
    for position in range(5, 9):
        logits, past = session.forward(ids[:, position : position + 1], past=past)
        rest.append(logits)
    assert whole.shape == (2, 9, VOCAB)
    assert len(past) == 2 * LAYERS
    np.testing.assert_allclose(np.concatenate(rest, axis=1), whole, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("logits_start", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_decoder_equals_forward(tmp_path: Path, form: str, logits_start: bool, shared: bool) -> None:
    """Shared buffer, growing past and the plain form give the same logits, with pruned logits or without."""
    decoder_form = TinyDecoder(grouped=FORMS[form].grouped, logits_start=logits_start)
    shared = shared and decoder_form.grouped
    session = Session.from_pretrained(decoder_form.write(tmp_path, shared=shared), provider="cpu")
    assert session.layout.logits_start is logits_start
    ids = tokens(2, 12)
    expected = session.prefill_logits(ids)
    decoder = session.decoder(batch=2, capacity=12)
    np.testing.assert_allclose(decoder.prefill(ids[:, :6]), expected[:, 5], atol=1e-4)
    for position in range(6, 12):
        np.testing.assert_allclose(decoder.step(ids[:, position]), expected[:, position], atol=1e-4)


@pytest.mark.parametrize("grouped", [True, False])
def test_cache_kind_is_read_from_the_graph_unless_declared(tmp_path: Path, grouped: bool) -> None:
    session = Session.from_pretrained(TinyDecoder(grouped=grouped).write(tmp_path), provider="cpu")
    assert session.config.shared_cache is None
    assert session._shares_cache is grouped


def test_shared_cache_does_not_move(tmp_path: Path) -> None:
    session = Session.from_pretrained(TinyDecoder().write(tmp_path), provider="cpu")
    decoder = session.decoder(batch=1, capacity=8)
    decoder.prefill(tokens(1, 4))
    addresses = [value.data_ptr() for value in decoder._binding.get_outputs()[: 2 * LAYERS]]
    decoder.step(np.array([3]))
    assert [value.data_ptr() for value in decoder._binding.get_outputs()[: 2 * LAYERS]] == addresses


def test_prefill_computes_the_last_logits_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session.from_pretrained(TinyDecoder().write(tmp_path), provider="cpu")
    decoder = session.decoder(batch=1, capacity=8)
    shapes: list[list[int]] = []
    run = decoder._run

    def run_and_look(input_ids: np.ndarray) -> None:
        run(input_ids)
        shapes.append(decoder._binding.get_outputs()[-1].shape())

    monkeypatch.setattr(decoder, "_run", run_and_look)
    decoder.prefill(tokens(1, 5))
    assert shapes == [[1, 1, VOCAB]]


def test_decoder_refuses_more_than_its_capacity(tmp_path: Path) -> None:
    session = Session.from_pretrained(TinyDecoder().write(tmp_path), provider="cpu")
    decoder = session.decoder(batch=1, capacity=4)
    with pytest.raises(InputError, match="call prefill first"):
        decoder.step(np.array([1]))
    decoder.prefill(tokens(1, 4))
    with pytest.raises(InputError, match="5 positions do not fit into 4"):
        decoder.step(np.array([1]))


@pytest.mark.parametrize("external", [True, False])
def test_accuracy_level_is_overridden_in_memory(tmp_path: Path, external: bool) -> None:
    folder = TinyDecoder(quantized_head=True, external=external).write(tmp_path)
    before = (folder / "model.onnx").read_bytes()
    ids = tokens(1, 5)
    stored, exact, fast = (
        Session.from_pretrained(folder, provider="cpu", accuracy_level=level).prefill_logits(ids)
        for level in (None, 0, 4)
    )
    np.testing.assert_array_equal(stored, fast)
    assert np.abs(exact - fast).max() > 1e-4
    np.testing.assert_allclose(exact, fast, atol=0.05 * np.abs(exact).max())
    assert (folder / "model.onnx").read_bytes() == before


def test_cuda_asked_for_and_absent_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TinyDecoder().write(tmp_path)
    monkeypatch.setattr(providers_module, "cuda_obstacle", lambda: "no CUDA driver found")
    with pytest.raises(ProviderError, match="no CUDA driver found"):
        Session.from_pretrained(folder, provider="cuda")


def test_silent_fallback_of_onnx_runtime_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TinyDecoder().write(tmp_path)
    cpu_only = ort.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    monkeypatch.setattr(providers_module, "cuda_obstacle", lambda: None)
    monkeypatch.setattr(providers_module, "_create", lambda *_: cpu_only)
    with pytest.raises(ProviderError, match="could not load its CUDA libraries"):
        Session.from_pretrained(folder, provider="cuda")


def test_auto_falls_back_with_one_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = TinyDecoder().write(tmp_path)
    monkeypatch.setattr(providers_module, "cuda_obstacle", lambda: "no CUDA driver found")
    with caplog.at_level(logging.WARNING):
        session = Session.from_pretrained(folder)
    assert session.device == "cpu"
    assert [record.getMessage() for record in caplog.records] == [
        "running on the CPU execution provider: no CUDA driver found"
    ]


@pytest.mark.parametrize(("form", "moves"), [(TinyDecoder(), True), (TinyDecoder(grouped=False), False)])
def test_float32_attention_is_kept_off_cuda(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    form: TinyDecoder,
    moves: bool,
) -> None:
    folder = form.write(tmp_path)
    asked: list[str] = []

    def open_on_cpu(model: Path, settings: SessionSettings) -> Any:
        asked.append(settings.provider)
        return ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])

    monkeypatch.setattr(session_module, "open_session", open_on_cpu)
    monkeypatch.setattr(session_module, "device_of", lambda _: "cuda")
    Session.from_pretrained(folder)
    assert asked == (["auto", "cpu"] if moves else ["auto"])
    assert ("no float32 kernel" in caplog.text) is moves
    if moves:
        with pytest.raises(ProviderError, match="no float32 kernel"):
            Session.from_pretrained(folder, provider="cuda")


def test_missing_graph(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no model\.onnx here"):
        Session.from_pretrained(tmp_path)


def test_broken_graph(tmp_path: Path) -> None:
    folder = TinyDecoder().write(tmp_path)
    (folder / "model.onnx").write_bytes(b"not a graph")
    for level in (None, 0):
        with pytest.raises(InputError, match=r"model\.onnx: "):
            Session.from_pretrained(folder, provider="cpu", accuracy_level=level)


def test_missing_external_data(tmp_path: Path) -> None:
    folder = TinyDecoder(external=True).write(tmp_path)
    (folder / "model.onnx.data").unlink()
    with pytest.raises(InputError, match=r"model\.onnx\.data"):
        Session.from_pretrained(folder, provider="cpu")


def test_broken_json(tmp_path: Path) -> None:
    folder = TinyDecoder().write(tmp_path)
    (folder / "genai_config.json").write_text("{")
    with pytest.raises(InputError, match=r"genai_config\.json: not valid JSON"):
        Session.from_pretrained(folder, provider="cpu")


def test_broken_tokenizer(tmp_path: Path) -> None:
    folder = TinyDecoder().write(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    session = Session.from_pretrained(folder, provider="cpu")
    with pytest.raises(InputError, match=r"tokenizer\.json: not a tokenizer"):
        session.generate("x")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("provider", "tpu"),
        ("threads", 0),
        ("accuracy_level", 3),
        ("max_length", 1),
        ("max_length", CONTEXT + 1),
    ],
)
def test_options_are_checked(tmp_path: Path, option: str, value: object) -> None:
    folder = TinyDecoder().write(tmp_path)
    with pytest.raises(InputError, match=option):
        Session.from_pretrained(folder, **{"provider": "cpu", option: value})  # type: ignore[arg-type]


def test_encoder_is_no_decoder_and_the_other_way_round(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="open encoders with Encoder"):
        Session.from_pretrained(write_encoder(tmp_path / "encoder"), provider="cpu")
    with pytest.raises(InputError, match="last_hidden_state"):
        EncoderSession.from_pretrained(TinyDecoder().write(tmp_path / "decoder"), provider="cpu")


def test_encoder_embeds_batches_like_single_texts(tmp_path: Path) -> None:
    encoder = EncoderSession.from_pretrained(write_encoder(tmp_path), provider="cpu")
    both = encoder.embed(["ab", "a longer one"])
    np.testing.assert_allclose(both[0], encoder.embed(["ab"])[0], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(both, axis=1), 1, rtol=1e-5)
    with pytest.raises(InputError, match="18 tokens"):
        encoder.embed(["seventeen letters"])

"""LongRoPE across the length at which it changes its factors, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from longrope_models import CONTEXT, FIELDS, LONGROPE, SWITCH, prompt
from tiny_models import tiny_model

from rk_export import export, verify
from rk_export.errors import InputError
from rk_export.evaluation.log_likelihood import Continuation, log_likelihoods
from rk_export.model.torch_logits import torch_logits
from rk_export.options.run import Run
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.decoder import Decoder
from rk_export.source.stored import open_source


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longrope")
    tiny_model("phi3", **FIELDS).save_pretrained(folder / "model")
    export(folder / "model", folder / "bundle", run=Run(threads=1))
    return folder


@pytest.fixture(scope="module")
def session(phi: Path) -> Session:
    return Session.from_pretrained(phi / "bundle", provider="cpu", threads=1)


def transformers_tokens(ids: list[int], new_tokens: int) -> list[int]:
    model = tiny_model("phi3", **FIELDS)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    output = model.generate(torch.tensor([ids]), max_new_tokens=new_tokens, do_sample=False)
    return [int(token) for token in output[0, len(ids) :]]


def ours(session: Session, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    found = session.generate(prompts, options=GenerationOptions(max_new_tokens=new_tokens))
    return [list(one.token_ids) for one in found]


def same(mine: list[int], theirs: list[int]) -> bool:
    """Ours ends at the model's end-of-sequence token, theirs was told of none."""
    return mine == theirs[: len(mine)] and (len(mine) == len(theirs) or mine[-1] == 2)


@pytest.mark.whole
@pytest.mark.parametrize("length", [30, SWITCH - 1, SWITCH, SWITCH + 1, 60])
def test_tokens_are_those_of_transformers(session: Session, length: int) -> None:
    ids = prompt(length, seed=length)
    theirs = transformers_tokens(ids, 40)
    assert same(ours(session, [ids], 40)[0], theirs)


@pytest.mark.whole
def test_rows_of_a_batch_get_the_tokens_they_get_alone(session: Session) -> None:
    """Rows that stay short, cross at different steps, cross together, and are long from the start."""
    rows = [prompt(length, seed) for seed, length in enumerate([10, 30, 30, 35, SWITCH, SWITCH + 1, 60])]
    together = ours(session, rows, 20)
    assert together == [ours(session, [row], 20)[0] for row in rows]
    assert all(same(mine, transformers_tokens(row, 20)) for mine, row in zip(together, rows, strict=True))


@pytest.mark.whole
@pytest.mark.parametrize("shared", [True, False])
def test_decoder_steps_over_the_switch(session: Session, shared: bool) -> None:
    """With a shared buffer and with a growing cache, every step has the logits of the whole text before it."""
    model = tiny_model("phi3", **FIELDS)
    ids = np.array([prompt(SWITCH + 4, seed=9), prompt(SWITCH + 4, seed=10)])
    session.__dict__["_shares_cache"] = shared
    decoder = session.decoder(batch=2, capacity=SWITCH + 4)
    decoder.prefill(ids[:, : SWITCH - 3])
    for end in range(SWITCH - 2, SWITCH + 5):
        with torch.no_grad():
            wanted = model(input_ids=torch.from_numpy(ids[:, :end])).logits[:, -1].numpy()
        np.testing.assert_allclose(decoder.step(ids[:, end - 1]), wanted, atol=1e-4 * np.abs(wanted).max())
    del session.__dict__["_shares_cache"]


@pytest.mark.whole
def test_what_needs_both_rotations_is_refused(session: Session) -> None:
    ids = np.array([prompt(SWITCH + 2)])
    _, past = session.forward(ids[:, : SWITCH - 1])
    session.forward(ids[:, SWITCH - 1 : SWITCH], past=past)
    with pytest.raises(InputError, match=f"the {SWITCH - 1} cached positions have the short ones"):
        session.forward(ids[:, SWITCH - 1 :], past=past)
    mask = np.ones((2, SWITCH + 2), np.int64)
    both = np.repeat(ids, 2, axis=0)
    session.prefill_logits(both, mask)
    mask[1, :5] = 0
    with pytest.raises(InputError, match=f"rows of {SWITCH - 3} and {SWITCH + 2} tokens"):
        session.prefill_logits(both, mask)
    decoder = session.decoder(batch=2, capacity=SWITCH + 2)
    decoder.prefill(both[:, :SWITCH], mask[:, :SWITCH])
    with pytest.raises(InputError, match="run rows of the two kinds apart"):
        decoder.step(both[:, SWITCH])


@pytest.mark.whole
def test_other_runtimes_are_told_the_length(phi: Path, session: Session) -> None:
    genai = json.loads((phi / "bundle" / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["context_length"] == genai["search"]["max_length"] == SWITCH
    card = (phi / "bundle" / "README.md").read_text(encoding="utf-8")
    assert f"Every runtime generates exactly up to {SWITCH} tokens" in card
    report = json.loads((phi / "bundle" / "report.json").read_text(encoding="utf-8"))
    assert any(f"at token {SWITCH + 1}" in notice for notice in report["notices"])
    assert session.max_length == CONTEXT


@pytest.mark.whole
def test_continuations_are_scored_under_their_own_rotation(phi: Path, session: Session) -> None:
    """Rows of both sides of the switch, of one task, in PyTorch and in the bundle."""
    lengths = (12, SWITCH - 2, SWITCH, SWITCH + 3, 70)
    pairs = [Continuation(tuple(prompt(length, length)), tuple(prompt(3, 99))) for length in lengths]
    limits = {"max_length": CONTEXT, "rotary_switch": SWITCH}
    model = torch_logits(open_source(phi / "model").load())
    alone = [log_likelihoods(model, [pair], **limits)[0].log_likelihood for pair in pairs]
    for logits in (model, session.prefill_logits):
        together = [one.log_likelihood for one in log_likelihoods(logits, pairs, **limits)]
        np.testing.assert_allclose(together, alone, rtol=1e-4)
    mixed = [one.log_likelihood for one in log_likelihoods(model, pairs, max_length=CONTEXT)]
    assert np.abs(np.array(mixed) - alone).max() > 1e-2, "the switch matters here"


@pytest.mark.whole
def test_parity_crosses_the_switch(phi: Path) -> None:
    report = json.loads((phi / "bundle" / "report.json").read_text(encoding="utf-8"))
    across = {tier["tier"]: tier for tier in report["parity"] if f"at {SWITCH} tokens" in tier["note"]}
    assert {"e", "g"} <= set(across)
    assert all(tier["passed"] and "is not crossed" not in tier["note"] for tier in across.values())
    assert across["e"]["max_error"] < 1e-4 * across["e"]["scale"]


@pytest.mark.whole
def test_parity_notices_a_cache_that_keeps_the_short_rotation(
    phi: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rk_export.runtime.decoder.Decoder._start_anew", _step_without_looking_back)
    monkeypatch.setattr("rk_export.runtime.engine.open_batch.TwoRotations", lambda short, long, switch: long)
    failed = [
        tier for tier in verify(phi / "bundle", provider="cpu", run=Run(threads=1)) if tier.passed is False
    ]
    assert {tier.tier for tier in failed} == {"e", "g"}


def _step_without_looking_back(decoder: Decoder) -> np.ndarray:
    decoder._reserve(1)
    decoder._run(np.ascontiguousarray(decoder._tokens[:, -1:]))
    logits = decoder._logits
    assert logits is not None
    return np.array(logits[:, 0])


@pytest.mark.whole
@pytest.mark.parametrize("switch", [5, 9, 31, 32, 33, CONTEXT - 1, CONTEXT, 2 * CONTEXT])
def test_parity_holds_wherever_the_switch_lies(tmp_path: Path, switch: int) -> None:
    """Below, inside and above the lengths that parity measures at, and where the model never gets to it."""
    fields = {**FIELDS, "original_max_position_embeddings": switch}
    fields["rope_parameters"] = {**LONGROPE, "original_max_position_embeddings": switch}
    tiny_model("phi3", **fields).save_pretrained(tmp_path / "model")
    report = export(tmp_path / "model", tmp_path / "bundle", run=Run(threads=1))
    assert all(tier.passed is not False for tier in report.parity)
    genai = json.loads((tmp_path / "bundle" / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["context_length"] == min(switch, CONTEXT)
    crossed = [tier for tier in report.parity if f"at {switch} tokens" in tier.note and tier.tier in "eg"]
    assert len(crossed) == (2 if switch < CONTEXT else 0)


@pytest.mark.whole
def test_genai_follows_the_switch_of_phi3(tmp_path: Path) -> None:
    """At 4096, the length of every published Phi-3, onnxruntime-genai computes the cache anew itself."""
    og = pytest.importorskip("onnxruntime_genai")
    switch = 4096
    fields = {"max_position_embeddings": switch + 64, "original_max_position_embeddings": switch}
    rope = {**LONGROPE, "original_max_position_embeddings": switch}
    tiny_model("phi3", num_hidden_layers=1, rope_parameters=rope, **fields).save_pretrained(
        tmp_path / "model"
    )
    export(tmp_path / "model", tmp_path / "bundle", run=Run(threads=1))
    genai = json.loads((tmp_path / "bundle" / "genai_config.json").read_text(encoding="utf-8"))
    assert genai["model"]["context_length"] == switch + 64
    ids = prompt(switch - 3)
    ours_there = ours(Session.from_pretrained(tmp_path / "bundle", provider="cpu", threads=1), [ids], 12)[0]
    assert len(ours_there) == 12, "the switch is crossed"
    model = og.Model(str(tmp_path / "bundle"))
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=switch + 32, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array([ids], np.int32))
    found = []
    for _ in ours_there:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert found == ours_there

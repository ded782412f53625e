"""`compare`: bundles, and dense models beside them, from their reports and measured anew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cli, tiny_options

from rk_export import EvalText, QuantSpec, Run, SpeedTest, compare, compress, evaluate
from rk_export.errors import InputError

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def other(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the same model in INT8, not factorized."""
    folder = tmp_path_factory.mktemp("other") / "llama-int8"
    compress(llama, folder, tiny_options(groups=(), quant=QuantSpec(8, 32)), run=Run(threads=1))
    return folder


def test_bundles_are_compared_without_running_them(
    bundle: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a session was opened")

    monkeypatch.setattr("rk_export.runtime.session.Session.from_pretrained", refuse)
    found = compare([bundle, other])
    first, second = found.models
    assert (first.name, second.name) == ("llama-int4", "llama-int8")
    assert first.file_bytes == sum(path.stat().st_size for path in bundle.glob("model.onnx*"))
    query = first.matrices["layers.0.q"]
    assert (query.form, query.shared_with, query.bits) == ("joint", ("k",), 4)
    assert len(query.errors) == 2
    assert second.matrices["layers.0.q"].choice == "dense, INT8 in blocks of 32"
    assert set(found.differing) == {
        f"layers.{i}.{role}" for i in (0, 1) for role in ("q", "k", "gate", "up", "v", "o", "down")
    }
    assert first.matrices["lm_head"].bits == 8
    assert all(size > 0 for size in first.layer_bytes.values())


def test_a_text_is_measured_on_all_with_paired_differences(
    llama: Path, bundle: Path, other: Path, prose: Path
) -> None:
    text = EvalText(prose, 64)
    found = compare([llama, bundle, other], texts=[text], provider="cpu", threads=1)
    scores = [model.scores[0] for model in found.models]
    assert [len(model.scores) for model in found.models] == [1, 1, 1]
    assert scores[1].value == evaluate(bundle, text, provider="cpu", threads=1).perplexity
    assert scores[0].difference is None
    assert scores[1].difference == pytest.approx(scores[1].value - scores[0].value)
    assert scores[2].difference_error < scores[1].difference_error  # INT8 is nearer to the dense model
    dense = found.models[0]
    assert (dense.kind, dense.matrices, dense.file_bytes > 0) == ("model", {}, True)


def test_speed_is_measured_in_turns_on_the_bundles(bundle: Path, other: Path) -> None:
    found = compare([bundle, other], speed=SpeedTest(16, 4, 1), provider="cpu", threads=1)
    assert [set(model.speed) for model in found.models] == [{"prefill", "decode"}] * 2


def test_refusals_come_before_anything_is_measured(
    llama: Path, bundle: Path, own_bundle: Path, tmp_path: Path, prose: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("measured too early")

    monkeypatch.setattr("rk_export.commands.compare.evaluate_models", refuse)
    (own_bundle / "report.json").unlink()
    text = EvalText(prose, 64)
    cases = [
        ([bundle], "at least two models"),
        ([bundle, bundle], "named twice"),
        ([bundle, llama], "no bundle here: a model or checkpoint has no report"),
        ([bundle, tmp_path / "none"], "no such folder"),
        ([bundle, own_bundle], "listed in the manifest but missing"),
    ]
    for models, message in cases:
        with pytest.raises(InputError, match=message):
            compare(models)
    with pytest.raises(InputError, match=r"no config\.json"):
        compare([bundle, tmp_path], texts=[text])


def test_the_command_writes_a_page(cli: Cli, bundle: Path, other: Path, prose: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = ("compare", bundle, other, "-o", page, "--text", prose, "--context", 64, "--threads", 1)
    ended = cli(*words, "--provider", "cpu")
    assert ended.code == 0, ended.err
    assert "difference to llama-int4" in ended.out
    assert f"page  {page}" in ended.err
    assert "--context 64" in page.read_text(encoding="utf-8")
    ended = cli("compare", bundle, other, "-o", page)
    assert (ended.code, "exists already" in ended.err) == (2, True)
    assert cli("compare", bundle, other, "-o", page, "--force").code == 0
    data = json.loads(cli("compare", bundle, other, "--json").out)
    assert [model["kind"] for model in data["models"]] == ["bundle", "bundle"]


@pytest.mark.parametrize(
    ("page", "message"), [("page.txt", "no name of a page"), ("folder.html", "is a folder")]
)
def test_a_page_has_a_place(
    cli: Cli, bundle: Path, other: Path, tmp_path: Path, page: str, message: str
) -> None:
    (tmp_path / "folder.html").mkdir()
    ended = cli("compare", bundle, other, "-o", tmp_path / page)
    assert (ended.code, message in ended.err) == (2, True)

"""Every sample runs, on the tiny model; what it prints is compared with what the package computes."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from rk_export.folders import check_manifest
from rk_export.report.records import Report
from rk_export.runtime import Generation, GenerationOptions, Session

pytestmark = pytest.mark.whole

SAMPLES = Path(__file__).parents[2] / "samples"
PROMPT = "The harbour was"
NO_COMMAND_LINE = {"parity_in_your_tests.py"}

Load = Callable[[str], ModuleType]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return a function from a sample's name to its module, freshly imported."""

    def module(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, SAMPLES / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)  # dataclasses look their module up
        spec.loader.exec_module(loaded)
        return loaded

    return module


@pytest.fixture
def expected(bundle: Path) -> Generation:
    """The greedy continuation that the package's own runtime gives."""
    session = Session.from_pretrained(bundle, provider="cpu", threads=1)
    return session.generate(PROMPT, options=GenerationOptions(max_new_tokens=8))[0]


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_sample_explains_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if path.name in NO_COMMAND_LINE:
        pytest.skip("it is a file of tests")
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_bench_sampling(load: Load) -> None:
    sample = load("bench_sampling")
    rows = [
        sample.measure(size, shape, name, 2)
        for size in sample.VOCABULARIES
        for shape in sample.SHAPES
        for name in sample.OPTIONS
    ]
    table = sample.markdown(rows, 2).splitlines()[-len(sample.OPTIONS) :]
    assert [line.split(" | ")[0].removeprefix("| ") for line in table] == list(sample.OPTIONS)
    slowest = max(row["least_ms"] for row in rows if row["options"] == "top-p 0.9")
    assert any(f"{slowest:.2f} / " in line for line in table)


def test_demo(
    load: Load, llama: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"context": 32, "tokens": 64, "prompt-tokens": 8, "new-tokens": 4, "repeats": 1, "threads": 1}
    arguments = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    paths = ["--model", str(llama), "--text", str(prose), "--out", str(tmp_path)]
    assert load("demo").main([*paths, "--question", "Where?", *arguments]) == 0
    shown = capsys.readouterr().out
    for line in ("kept parameters", "perplexity", "tokens per second", "Parity", "Answer", "report.html"):
        assert line in shown
    bundle = tmp_path / "bundle"
    check_manifest(bundle)
    report = Report.load(bundle / "report.json")
    assert set(report.speed) == {"prefill", "decode"}
    assert set(report.perplexity) == {"dense", "compressed (ONNX Runtime)"}
    assert "prefill" in (bundle / "report.html").read_text(encoding="utf-8")


def test_demo_reports_bad_input(load: Load, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent")
    assert load("demo").main(["--model", absent, "--text", absent, "--out", str(tmp_path / "out")]) == 2
    assert "absent" in capsys.readouterr().err


def test_quickstart(load: Load, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load("quickstart").main([str(llama), str(tmp_path / "out"), "--prompt", PROMPT])
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert "layers.0.qk" in capsys.readouterr().out


def test_deploy_onnxruntime_gives_the_runtimes_tokens(
    load: Load, bundle: Path, expected: Generation, capsys: pytest.CaptureFixture[str]
) -> None:
    load("deploy_onnxruntime").main([str(bundle), "-p", PROMPT, "--max-new-tokens", "8"])
    assert capsys.readouterr().out.rstrip("\n") == (PROMPT + expected.text).rstrip("\n")


def test_deploy_genai_gives_the_runtimes_tokens(
    load: Load, bundle: Path, expected: Generation, capsys: pytest.CaptureFixture[str]
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    sample = load("deploy_genai")
    model = og.Model(str(bundle))
    prompt = og.Tokenizer(model).encode(PROMPT)
    assert tuple(sample.greedy(model, prompt, 8)) == expected.token_ids
    sample.main([str(bundle), "-p", PROMPT, "--chat", "--max-new-tokens", "8"])
    assert capsys.readouterr().out.strip()


def test_parity_in_your_tests(load: Load, bundle: Path, llama: Path) -> None:
    tests = load("parity_in_your_tests")
    tests.test_bundle_keeps_its_promises(str(bundle))
    tests.test_cache_and_padding_are_exact(str(bundle))
    tests.test_onnxruntime_computes_what_pytorch_computes(str(bundle), str(llama))


def test_groupings_goes_on_where_it_stopped(
    load: Load, llama: Path, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("factorize_groupings")
    base = ["--model", str(llama), "--text", str(prose), "--tokens", "64", "--context", "32"]
    module.main([*base, "--out", str(tmp_path), "--rows", "dense", "q*k*@0.9"])
    rows = {row["grouping"]: row for row in json.loads((tmp_path / "groupings.json").read_text())["rows"]}
    assert set(rows) == {"dense", "qk-whole", "qk-per-head", "q+k-separate", "qkv", "q+k+v-separate"}
    assert all(0.8 < row["kept"] <= 0.9 for name, row in rows.items() if name != "dense")
    assert all(0 < row["relative_error"] < 1 for name, row in rows.items() if name != "dense")
    page = (tmp_path / "groupings.md").read_text(encoding="utf-8")
    assert "qk-whole at 0.9: perplexity" in page

    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    module.main([*base, "--out", str(tmp_path), "--rows", "q*k*@0.9"])


def test_groupings_relative_error_is_that_of_the_matrices(load: Load, llama: Path, prose: Path) -> None:
    import torch

    from rk_export.evaluation.measure import EvalText
    from rk_export.source.stored import open_source

    module = load("factorize_groupings")
    grouping = next(item for item in module.GROUPINGS if item.name == "q+k-separate")
    source = open_source(llama)
    row = module.measure(source, grouping, 0.9, EvalText(prose, 32, 64))
    lost = total = 0.0
    for layer in source.load().model.layers:
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            values = torch.linalg.svdvals(linear.weight.double())
            rank = int(0.9 * linear.weight.numel() / sum(linear.weight.shape))
            lost += float(values[rank:].square().sum())
            total += float(values.square().sum())
    assert row.relative_error == pytest.approx((lost / total) ** 0.5, rel=1e-4)

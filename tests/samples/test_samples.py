"""Every sample runs, on the tiny model; what it prints is compared with what the package computes."""

from __future__ import annotations

import ast
import importlib
import runpy
import sys
from pathlib import Path

import pytest

from rk_export import Plan
from rk_export.manifest import check_manifest
from rk_export.runtime import Generation, GenerationOptions, Session

pytestmark = pytest.mark.whole

SAMPLES = Path(__file__).parents[2] / "samples"
SHORT = sorted(SAMPLES.glob("*.py"))
PARTS = ("harness.py", "floors.py", "served.py")  # of the measurements; no scripts
SCRIPTS = [
    *(path for path in SHORT if path.name != "parity_in_your_tests.py"),  # that one is a file of tests
    SAMPLES / "assets" / "__main__.py",
    *(path for path in sorted((SAMPLES / "measure").glob("*.py")) if path.name not in PARTS),
    *sorted((SAMPLES / "papers").glob("*/main.py")),
]
PUBLIC = {"rk_export", "rk_export.runtime", "rk_export.runtime.engine", "rk_export.testing"}
# What only an experiment on the inside of a method or a stage needs, counted in modules; everything else is public.
INSIDE = {
    "measure/bench_factorization.py": 2,
    "measure/bench_sampling.py": 1,
    "measure/measure_export.py": 1,
    "measure/measure_sparse_export.py": 3,
    "measure/mixtures.py": 1,
    "measure/served.py": 3,
    "papers/basel/comparison.py": 4,
    "papers/basel/main.py": 1,
    "papers/cap/workshop.py": 14,
    "papers/joint_rank/denoise.py": 2,
    "papers/joint_rank/figure4.py": 4,
    "papers/joint_rank/ladder.py": 11,
    "papers/joint_rank/orthogonality.py": 5,
    "papers/joint_rank/spectra.py": 1,
    "papers/joint_rank/study.py": 6,
    "ray_serve/app.py": 7,
    "ray_serve/repeat.py": 1,
}
PROMPT = "The harbour was"


def modules_of_ours(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    names |= {item.name for node in ast.walk(tree) if isinstance(node, ast.Import) for item in node.names}
    return {name for name in names if name.split(".")[0] == "rk_export"}


def test_samples_use_the_public_names() -> None:
    """The short ones nothing else; experiments no more modules of the inside than is written down here."""
    assert len(SHORT) == 8
    for path in SAMPLES.rglob("*.py"):
        inside = modules_of_ours(path) - PUBLIC
        assert len(inside) <= INSIDE.get(path.relative_to(SAMPLES).as_posix(), 0), sorted(inside)


@pytest.fixture
def expected(bundle: Path) -> Generation:
    """The greedy continuation that the package's own runtime gives."""
    session = Session.from_pretrained(bundle, provider="cpu", threads=1)
    return session.generate(PROMPT, options=GenerationOptions(max_new_tokens=8))[0]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(SAMPLES).as_posix())
def test_script_explains_itself(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python PATH --help` does it: of our folders, only the script's own is on the path."""
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    monkeypatch.setattr(sys, "path", [str(path.parent), *(one for one in sys.path if one != str(SAMPLES))])
    for name, module in list(sys.modules.items()):
        if str(SAMPLES) in str(getattr(module, "__file__", None) or getattr(module, "__path__", "")):
            monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


def test_demo(llama: Path, prose: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sizes = {"context": 32, "tokens": 64, "threads": 1, "size": "0.3MB"}
    arguments = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    paths = ["--model", str(llama), "--text", str(prose), "--out", str(tmp_path)]
    assert importlib.import_module("demo").main([*paths, "--question", "Where?", *arguments]) == 0
    shown = capfd.readouterr().out
    for line in ("$ rk-export compress", "perplexity on", "decode tok/s", "parity passed", "report.html"):
        assert line in shown
    for name in ("default", "0.3MB", "w8a8", "dense"):
        check_manifest(tmp_path / name)
    assert "decode" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_demo_reports_bad_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    absent = str(tmp_path / "absent")
    words = ["--model", absent, "--text", absent, "--out", str(tmp_path / "out")]
    assert importlib.import_module("demo").main(words) == 2
    assert "absent" in capfd.readouterr().err


def test_quickstart(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("quickstart").main([str(llama), str(tmp_path / "out"), "--prompt", PROMPT])
    assert (tmp_path / "out" / "model.onnx").is_file()
    assert "layers.0.qk" in capsys.readouterr().out


def test_plan_a_size(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--megabytes", "0.3", "0.5", "--apply", "0.3"]
    importlib.import_module("plan_a_size").main([str(llama), str(tmp_path), *sizes])
    tight, loose = (Plan.load(tmp_path / f"plan-{size}MB.json") for size in ("0.3", "0.5"))
    assert (tight.predicted_loss or 0) > (loose.predicted_loss or 0)
    assert "dense INT" in capsys.readouterr().out
    files = (tmp_path / "bundle-0.3MB" / name for name in ("model.onnx", "model.onnx.data"))
    assert sum(path.stat().st_size for path in files) <= 0.3e6


def test_deploy_onnxruntime_gives_the_runtimes_tokens(
    bundle: Path, expected: Generation, capsys: pytest.CaptureFixture[str]
) -> None:
    importlib.import_module("deploy_onnxruntime").main([str(bundle), "-p", PROMPT, "--max-new-tokens", "8"])
    assert capsys.readouterr().out.rstrip("\n") == (PROMPT + expected.text).rstrip("\n")


def test_deploy_genai_gives_the_runtimes_tokens(
    bundle: Path, expected: Generation, capsys: pytest.CaptureFixture[str]
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    sample = importlib.import_module("deploy_genai")
    model = og.Model(str(bundle))
    prompt = og.Tokenizer(model).encode(PROMPT)
    assert tuple(sample.greedy(model, prompt, 8)) == expected.token_ids
    sample.main([str(bundle), "-p", PROMPT, "--chat", "--max-new-tokens", "8"])
    assert capsys.readouterr().out.strip()


def test_deploy_genai_engine_gives_the_runtimes_tokens(
    bundle: Path, expected: Generation, capsys: pytest.CaptureFixture[str]
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    sample = importlib.import_module("deploy_genai_engine")
    model, texts = og.Model(str(bundle)), [PROMPT, "Add the salt, fold the dough, and", "The train"]
    prompts = [og.Tokenizer(model).encode(text) for text in texts]
    assert tuple(sample.answers(model, prompts, 8)[0]) == expected.token_ids
    sample.main([str(bundle), "--max-new-tokens", "8", *(word for text in texts for word in ("-p", text))])
    lines = capsys.readouterr().out.splitlines()
    assert [line[1 : len(text) + 1] for line, text in zip(lines, texts, strict=True)] == texts


def test_parity_in_your_tests(bundle: Path, llama: Path) -> None:
    tests = importlib.import_module("parity_in_your_tests")
    tests.test_bundle_keeps_its_promises(str(bundle))
    tests.test_cache_and_padding_are_exact(str(bundle))
    tests.test_onnxruntime_computes_what_pytorch_computes(str(bundle), str(llama))

"""A checkpoint that brings Python code: one refusal that names the file, and neither a question nor a run."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import change_json
from conftest import Cli
from planted_code import Planted
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from rk_export.errors import InputError
from rk_export.source import find_model
from rk_export.source.remote_code import refuse_remote_code
from rk_export.source.stored import open_source, read_config
from rk_export.training.state import StateFile

ROOT = Path(__file__).parents[2]
KINDS = ("config", "model", "tokenizer", "generation", "decoding")
SMALL = ("--recipe", "floats", "--device", "cpu", "--threads", 1)


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Answer every question of transformers with yes; return the questions."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    return asked


Plant = Callable[[Path], Planted]


@pytest.fixture
def plant_in(tmp_path: Path, answers: list[str]) -> Plant:
    def planted(folder: Path) -> Planted:
        one = Planted(folder, tmp_path / "marker")
        one.questions = answers
        return one

    return planted


@pytest.fixture
def model(llama: Path, tmp_path: Path, plant_in: Plant) -> Planted:
    """A copy of the tiny model, to plant code in."""
    return plant_in(Path(shutil.copytree(llama, tmp_path / "model")))


# --- what the planted code would do


@pytest.mark.parametrize(
    ("kind", "loader"),
    [("config", AutoConfig), ("model", AutoModelForCausalLM), ("tokenizer", AutoTokenizer)],
)
def test_transformers_runs_such_code_when_it_is_trusted(model: Planted, kind: str, loader: Any) -> None:
    model.plant(kind)
    with pytest.raises(AttributeError):  # what the code defines is no class of transformers
        loader.from_pretrained(model.folder, trust_remote_code=True)
    assert model.marker.exists()


def test_transformers_asks_where_it_has_no_class_of_its_own(model: Planted) -> None:
    model.plant("config")
    change_json(model.folder / "config.json", model_type="evil")
    with pytest.raises(AttributeError):
        AutoConfig.from_pretrained(model.folder)
    assert model.questions
    assert model.marker.exists()


# --- every command refuses it


@pytest.fixture
def commands(bundle: Path, prose: Path, tmp_path: Path) -> Callable[[Path], Iterator[tuple[object, ...]]]:
    out = tmp_path / "out"

    def of(folder: Path) -> Iterator[tuple[object, ...]]:
        yield "compress", folder, "-o", out, *SMALL
        yield "export", folder, "-o", out
        yield "eval", folder, "--text", prose
        yield "prepare", folder, "-o", out
        yield "analyze", folder, "-o", out
        yield "plan", folder, "-o", out.with_suffix(".json")
        yield "verify", bundle, "--against", folder

    return of


@pytest.mark.whole
@pytest.mark.parametrize("model_type", ["llama", "evil"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_command_refuses_it(
    cli: Cli,
    model: Planted,
    commands: Callable[[Path], Iterator[tuple[object, ...]]],
    tmp_path: Path,
    kind: str,
    model_type: str,
) -> None:
    guilty = model.plant(kind)
    change_json(model.folder / "config.json", model_type=model_type)
    for command in commands(model.folder):
        ended = cli(*command)
        assert ended.code == 2, ended.err
        assert f"rk-export: error: {guilty}: names code" in ended.err
        assert "Traceback" not in ended.err
        assert f"\nFix: {'if transformers' if model_type == 'llama' else 'use another'}" in ended.err
        assert model.is_untouched
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["config", "tokenizer"])
def test_a_compressed_checkpoint_is_refused_too(
    cli: Cli, model: Planted, prose: Path, tmp_path: Path, kind: str
) -> None:
    change_json(model.folder / "config.json", rk_export={"version": 1})
    guilty = model.plant(kind)
    for command in (
        ("export", model.folder, "-o", tmp_path / "out"),
        ("eval", model.folder, "--text", prose),
    ):
        ended = cli(*command)
        assert ended.code == 2
        assert f"{guilty}: names code" in ended.err
    assert model.is_untouched


@pytest.mark.whole
def test_bundles_run_without_looking_at_code(
    cli: Cli, own_bundle: Path, prose: Path, plant_in: Plant
) -> None:
    planted = plant_in(own_bundle)
    for kind in KINDS:
        planted.plant(kind)
    run = cli("run", own_bundle, "-p", "the", "--max-new-tokens", 2, "--provider", "cpu")
    chat = cli("run", own_bundle, "-p", "the", "--chat", "--max-new-tokens", 2, "--provider", "cpu")
    scored = cli("eval", own_bundle, "--text", prose, "--context", 32, "--provider", "cpu")
    speeds = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1)
    bench = cli("bench", own_bundle, *speeds, "--provider", "cpu")
    assert [ended.code for ended in (run, chat, scored, bench)] == [0, 0, 0, 0]
    assert planted.is_untouched


@pytest.mark.whole
@pytest.mark.parametrize(
    "options",
    [
        {"custom_ops_library": "evil.so"},
        {"provider_options": [{"trt": {"trt_extra_plugin_lib_paths": "evil.so"}}]},
    ],
    ids=["operators", "plugins"],
)
def test_native_code_that_a_bundle_names_for_genai_is_not_loaded(
    cli: Cli, own_bundle: Path, options: dict[str, Any]
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="needs the extra: pip install 'rk-export[genai]'")
    path = own_bundle / "genai_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model"]["decoder"]["session_options"] |= options
    path.write_text(json.dumps(settings), encoding="utf-8")
    ended = cli("bench", own_bundle, "--against", f"genai:{own_bundle}", "--provider", "cpu")
    assert ended.code == 2
    assert f"rk-export: error: {path}: " in ended.err
    assert "names native code" in ended.err
    assert cli("run", own_bundle, "-p", "the", "--max-new-tokens", 1, "--provider", "cpu").code == 0


# --- every form in which code is named


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        ("config.json", {"text_config": {"auto_map": {"AutoConfig": "x.X"}}}, "text_config.auto_map: x.X"),
        ("config.json", {"parts": [{"auto_map": {"AutoModel": "x.X"}}]}, "parts.0.auto_map: x.X"),
        ("config.json", {"auto_map": {"AutoConfig": "org/name--x.X"}}, "auto_map: x.X of org/name on the hub"),
        ("config.json", {"auto_map": None}, "auto_map: null"),
        ("config.json", {"auto_map": "x.X"}, "auto_map: x.X"),
        ("config.json", {"auto_map": ["AutoConfig"]}, "auto_map: AutoConfig"),
        ("config.json", {"auto_map": {"AutoConfig": 3}}, "auto_map: 3"),
        ("tokenizer_config.json", {"auto_map": ["x.X", None]}, "auto_map: x.X, null"),
        ("tokenizer_config.json", {"auto_map": []}, "auto_map: []"),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "x.XFast"]}}, "auto_map: null, x.XFast"),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "x.X"}}, "auto_map: x.X"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "x.X"}}, "auto_map: x.X"),
        ("config.json", {"attn_implementation": "org/kernel"}, "attn_implementation: org/kernel on the hub"),
        ("config.json", {"_attn_implementation": "org/k@v1:f"}, "_attn_implementation: org/k@v1:f on the hub"),
        ("config.json", {"_attn_implementation_internal": {"": "org/k"}}, "internal: org/k on the hub"),
        ("config.json", {"experts_implementation": "org/kernel"}, "experts_implementation: org/kernel on the hub"),
    ],
    ids=str,
)  # fmt: skip
def test_each_form_is_found(model: Planted, file: str, changes: dict[str, Any], named: str) -> None:
    path = model.folder / file
    if not path.exists():
        path.write_text("{}", encoding="utf-8")
    change_json(path, **changes)
    with pytest.raises(InputError) as caught:
        open_source(model.folder)
    assert caught.value.where == str(path)
    assert f"{named})" in caught.value.what


def test_all_entries_are_named_at_once(model: Planted) -> None:
    for kind in KINDS:
        model.plant(kind)
    with pytest.raises(InputError) as caught:
        refuse_remote_code(model.folder)
    assert "model_evil.Evil in model_evil.py" in caught.value.what
    for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
        assert f"auto_map from {file}" in str(caught.value.fix)
    assert "custom_generate/generate.py" in str(caught.value.fix)


def test_what_the_fix_says_works(model: Planted) -> None:
    model.plant("config")
    change_json(
        model.folder / "config.json", auto_map={}
    )  # nothing is named any more; the code may lie there
    assert open_source(model.folder).config.model_type == "llama"
    assert model.is_untouched


@pytest.mark.parametrize("kernel", ["flash_attention_2", "flash_attention_3", "eager", "sdpa", "unheard_of"])
def test_the_kernel_that_a_file_asks_for_is_no_part_of_the_model(model: Planted, kernel: str) -> None:
    for key in ("attn_implementation", "_attn_implementation", "experts_implementation"):
        change_json(model.folder / "config.json", **{key: kernel})
    assert open_source(model.folder).skeleton().config._attn_implementation == "sdpa"


def test_of_the_hub_only_small_files_come_before_the_refusal(
    model: Planted, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.plant("config")
    patterns: list[list[str]] = []

    def snapshot(name: str, allow_patterns: list[str], **_: object) -> str:
        patterns.append(allow_patterns)
        return str(model.folder)

    monkeypatch.setattr(find_model, "snapshot_download", snapshot)
    with pytest.raises(InputError, match="names code"):
        open_source("org/name")
    assert patterns == [["*.json"]]


def test_a_config_that_is_refused_is_not_read_by_transformers_either(model: Planted) -> None:
    (model.folder / "config.json").write_text("[]", encoding="utf-8")
    model.plant("tokenizer")
    with pytest.raises(InputError, match="names code"):
        read_config(model.folder)


# --- pickles


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_the_state_of_a_training_runs_nothing(tmp_path: Path) -> None:
    import pickle

    import torch

    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Bomb(marker)))  # noqa: S301 (what a careless reader would do)
    assert marker.exists()
    marker.unlink()
    torch.save({"version": 1, "state": Bomb(marker)}, tmp_path / "zipped.state")
    (tmp_path / "plain.state").write_bytes(pickle.dumps(Bomb(marker), protocol=2))
    for name in ("zipped.state", "plain.state"):
        with pytest.raises(InputError, match="is no state of a recovery"):
            StateFile(tmp_path / name, "run").read()
    assert not marker.exists()


# --- no call that could

LOADERS = {"from_pretrained", "from_config"}
OURS = {"Session", "EncoderSession", "cls"}  # bundles: no transformers behind them
WITHOUT = {"GenerationConfig"}  # reads JSON, knows no remote code, and would keep the argument as a field
NEVER = {"get_class_from_dynamic_module", "load_custom_generate", "pipeline", "load_dataset"}


def unsafe_calls(source: str) -> list[str]:
    """Return line and name of each call that could run what an input brings."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        owner, name = _called(node.func)
        arguments = {word.arg: ast.unparse(word.value) for word in node.keywords}
        trusts = "trust_remote_code" in arguments and arguments["trust_remote_code"] != "False"
        forgets = name in LOADERS and owner not in OURS | WITHOUT and "trust_remote_code" not in arguments
        unpickles = (owner, name) == ("torch", "load") and arguments.get("weights_only") != "True"
        unpickles |= name == "load" and arguments.get("allow_pickle", "False") != "False"
        if trusts or forgets or unpickles or name in NEVER or (owner, name) == ("hub", "load"):
            found.append(f"{node.lineno}: {name}")
    return found


def _called(function: ast.expr) -> tuple[str, str]:
    """Return the last two names of what is called: class and method."""
    if isinstance(function, ast.Attribute):
        return _called(function.value)[1], function.attr
    return "", function.id if isinstance(function, ast.Name) else ""


def test_no_call_can_run_what_an_input_brings() -> None:
    folders = ("rk_export", "passes", "runtime", "samples", "optimum_commands", "tests/optimum_env")
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    calls = {str(path.relative_to(ROOT)): unsafe_calls(path.read_text(encoding="utf-8")) for path in paths}
    assert len(paths) > 100
    assert {path: found for path, found in calls.items() if found} == {}


@pytest.mark.parametrize(
    "call",
    [
        "AutoConfig.from_pretrained(folder)",
        "transformers.AutoModel.from_config(config)",
        "auto.from_pretrained(folder, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)",
        "GenerationConfig.from_pretrained(folder, trust_remote_code=None)",
        "LlamaForCausalLM.from_pretrained(folder)",
        "pipeline('text-generation', folder)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.hub.load('org/name', 'model')",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_finds_a_careless_call(call: str) -> None:
    assert unsafe_calls(f"x = {call}")


def test_the_search_passes_a_careful_call() -> None:
    careful = (
        "AutoConfig.from_pretrained(f, trust_remote_code=False); torch.load(p, weights_only=True); np.load(p)"
    )
    assert unsafe_calls(careful) == []

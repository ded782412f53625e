"""Shared by the tests of the whole pipeline: a tiny model with a tokenizer, its bundle, devices, tolerances.

Nothing of ours is imported at the head: the tests of `optimum_env` run where rk-export is not installed.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import whole_runs

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import ONNX Runtime before rk-export

MakeOnce = Callable[[str, Callable[[Path], object]], Path]

if TYPE_CHECKING:
    from rk_export.options.recipe import Recipe
    from rk_export.source.stored import StoredModel

SENTENCES = [
    "The harbour was quiet in the early morning, and only the gulls moved between the masts.",
    "Add the salt, fold the dough, and wait until it has doubled.",
    "The train leaves at 9:15 and arrives at 10:45.",
    "The committee met on Tuesday to discuss the budget for the coming year.",
]
VOCABULARY = 320
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }} {% endfor %}"

# Largest difference over the largest logit, by the float type of the graph.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


def pytest_collectstart() -> None:
    """Guard whole runs in the process that imports the tests, before it does; see `whole_runs`."""
    whole_runs.install()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Hold tests to their markers; see `whole_runs`."""
    whole_runs.enter(item)


@pytest.fixture(scope="session")
def tolerance() -> dict[str, float]:
    """Largest difference over the largest logit, by the float type of the graph."""
    return TOLERANCE


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """`cpu`, and `cuda` where PyTorch has it."""
    import torch

    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.fixture(scope="session")
def source_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., StoredModel]:
    """Return a function from family and config fields to the saved tiny model; equal arguments share one."""
    from tiny_models import tiny_model

    from rk_export.source.stored import open_source

    sources: dict[str, StoredModel] = {}

    def source(family: str, **overrides: Any) -> StoredModel:
        key = repr((family, sorted(overrides.items())))
        if key not in sources:
            folder = tmp_path_factory.mktemp(family)
            tiny_model(family, **overrides).save_pretrained(folder)
            sources[key] = open_source(folder)
        return sources[key]

    return source


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama model with tokenizer, end-of-text token and chat template; do not change it."""
    from tiny_models import tiny_model

    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_model("llama", vocab_size=VOCABULARY).save_pretrained(folder)
    tokenizer = trained_tokenizer()
    tokenizer.save_pretrained(folder)
    return folder


def trained_tokenizer() -> Any:
    """Return a byte-level BPE tokenizer of at most `VOCABULARY` tokens; ids 0 to 2 are pad, bos and eos."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tiny_options(**changes: Any) -> Recipe:
    """Return a recipe that factorizes and quantizes every matrix of the tiny model."""
    from made_recipes import made_recipe

    from rk_export.options.calibration import UNWEIGHED
    from rk_export.options.ranks import RankRule

    fields = {
        "groups": ("qk", "gate_up"),
        "rank": RankRule("keep", 0.8),
        "calibration": UNWEIGHED,
        "quantizer": "rtn",
    }
    return made_recipe(**{**fields, **changes})


@pytest.fixture(scope="session")
def bundle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundle of the tiny Llama model, factorized and in INT4; do not change it."""
    from rk_export import Run, compress

    folder = tmp_path_factory.mktemp("bundles") / "llama-int4"
    compress(llama, folder, tiny_options(), run=Run(threads=1))
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Return what makes a costly folder once for all processes that run tests side by side."""
    from filelock import FileLock

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def make(name: str, write: Callable[[Path], object]) -> Path:
        with FileLock(shared / f"{name}.lock"):
            if not (shared / name).exists():
                write(shared / name)
        return shared / name

    return make


@pytest.fixture(scope="session")
def off_grid(made_once: MakeOnce) -> Path:
    """SmolLM2-135M-Instruct with other weights and the same logits; for tests marked `real_model`.

    The packaged weights lie on a 4-bit grid, where every quantizer looks perfect.
    """
    from fetched import smollm2

    from rk_export import prepare

    return made_once("off-grid", lambda folder: prepare(smollm2(), folder, seed=7))


@pytest.fixture(scope="session")
def smollm2_int4(made_once: MakeOnce, off_grid: Path) -> Path:
    """Bundle of `off_grid` by the recipe `int4`; for tests marked `real_model`."""
    from rk_export import Recipe, Run, compress

    int4 = Recipe.load("int4")
    return made_once("smollm2-int4", lambda folder: compress(off_grid, folder, int4, run=Run(threads=1)))


@pytest.fixture
def own_bundle(bundle: Path, tmp_path: Path) -> Path:
    """A copy of `bundle` that a test may damage."""
    return Path(shutil.copytree(bundle, tmp_path / "own-bundle"))


@pytest.fixture(scope="session")
def prose(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of some hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "prose.txt"
    path.write_text("\n".join(SENTENCES * 2), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


Cli = Callable[..., Ended]


@pytest.fixture
def made_up_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dry runs take the machine's rates as given: measuring them takes seconds."""
    from rk_export.commands import dry_run
    from rk_export.planning.resources import KINDS

    monkeypatch.setattr(dry_run, "machine_rates", lambda *_, **__: dict.fromkeys(KINDS, 1e9))


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], made_up_rates: None) -> Iterator[Cli]:
    """Run `rk-export` in this process; return exit code and output."""
    from rk_export.cli.main import main

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse ends this way
            code = int(stop.code or 0)
        return Ended(code, *capsys.readouterr())

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield run
    root.handlers[:] = handlers  # main() sends the log to a stream that is gone after the test
    root.setLevel(level)

"""Every preset end to end on a tiny model: what it promises is in the plan, parity holds, and the bundle's own recipe
makes the same bundle again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Cli, Ended
from quantized_models import gptq, gptq_config, save_quantized, small

from rk_export import Plan, Report
from rk_export.manifest import MANIFEST
from rk_export.options.quantization import W8A8, QuantSpec
from rk_export.recipes import RECIPE, load, preset_names

pytestmark = pytest.mark.whole

INT2, INT4, INT8 = QuantSpec(2, 16, symmetric=False), QuantSpec(4, 32), QuantSpec(8, 32)
# They tell when and how a bundle was made.
TOLD = {"report.json", "report.html", MANIFEST}
BASEL = ("basel.steps=3", "basel.batch_tokens=64", "basel.new_basis=2", "basel.keep=0.8")


@dataclass(frozen=True)
class Promise:
    """What a preset promises of every matrix.

    Args:
        forms: The forms that sites have, all of them.
        formats: The formats that sites have, all of them, None for floats; without any a budget chooses them all.
        table: The format of the embedding.
        settings: What makes it fast here, and what it cannot do without.
        holds: What else is in the plan.
    """

    forms: set[str]
    formats: set[QuantSpec | None]
    table: QuantSpec | None = None
    settings: tuple[str, ...] = ()
    holds: Callable[[Plan], bool] = lambda _: True


def spent(plan: Plan) -> bool:
    """Whether a budget of bytes chose a format for each matrix."""
    budget, formats = plan.recipe.budget, {site.quant for site in plan.sites}
    chosen = None not in formats and len(formats) > 1 and (plan.predicted_loss or 0) > 0
    return chosen and budget is not None and budget.kind == "size"


def joined(plan: Plan) -> bool:
    """Whether q and k, gate and up were factorized together, and nothing else was."""
    return {site.members for site in plan.sites if site.rank} == {("q", "k"), ("gate", "up")}


def low_rank(plan: Plan) -> bool:
    """Whether some matrices became factors."""
    return any(site.rank for site in plan.sites)


def only_entries(plan: Plan) -> bool:
    """Whether half of the entries of every matrix stayed, and no direction."""
    return all(site.rank == 0 and site.entries > 0 for site in plan.sites)


def some_entries(plan: Plan) -> bool:
    """Whether entries stayed; random matrices have no direction that would pay."""
    return any(site.entries for site in plan.sites)


def mixed(plan: Plan) -> bool:
    """Whether directions and entries stayed."""
    return low_rank(plan) and any(site.entries for site in plan.sites)


def pruned(plan: Plan) -> bool:
    """Whether one of two blocks went, and a tenth of the other's 128 neurons, rounded to whole blocks of INT4."""
    return plan.pruning is not None and len(plan.pruning.blocks) == 1 and plan.pruning.ffn_width == 96


def carried(plan: Plan) -> bool:
    """Whether the checkpoint's codes stayed."""
    return all(site.carried for site in plan.sites)


PROMISES = {
    "default": Promise({"dense"}, set(), holds=spent),
    "basel": Promise({"joint"}, {None}, None, BASEL, low_rank),
    "basel-whitened": Promise({"joint"}, {None}, None, BASEL, low_rank),
    "cap": Promise({"sparse"}, {None}, None, ("cap.steps=3", "cap.batch_tokens=128"), mixed),
    "carry": Promise({"dense"}, {INT4}, INT8, holds=carried),
    "floats": Promise({"dense"}, {None}, None),
    "int2": Promise({"dense"}, {INT2}, INT8),
    "int4": Promise({"dense"}, {INT4}, INT8),
    "int8": Promise({"dense"}, {INT8}, INT8),
    "joint-rank": Promise({"joint", "dense"}, {None}, None, holds=joined),
    "mixtures": Promise({"sparse"}, {None}, None, holds=mixed),
    "pruned": Promise({"dense"}, {INT4}, INT8, ("heal.steps=2",), pruned),
    "sslc": Promise({"sparse"}, {None}, None, holds=some_entries),
    "w8a8": Promise({"dense"}, {W8A8}, INT8),
    "wanda": Promise({"sparse"}, {None}, None, holds=only_entries),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint of GPTQ."""
    folder = tmp_path_factory.mktemp("models") / "gptq"
    save_quantized(small(), folder, gptq_config(), gptq(symmetric=True))
    return folder


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory, prose: Path) -> Path:
    """A text of a thousand tokens."""
    path = tmp_path_factory.mktemp("texts") / "task.txt"
    path.write_text(8 * prose.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def compressed(cli: Cli, model: Path, folder: Path, recipe: str | Path, *words: object) -> Ended:
    """Run `compress` on one thread; every bundle has the same name."""
    return cli("compress", model, "-o", folder / "bundle", "--recipe", recipe, "--threads", 1, *words)


def told_again(first: Path, second: Path) -> list[str]:
    """Return the files of two bundles that differ, those apart that tell of the run itself."""
    names = {path.relative_to(first).as_posix() for path in first.rglob("*") if path.is_file()}
    others = {path.relative_to(second).as_posix() for path in second.rglob("*") if path.is_file()}
    assert names == others
    assert {"model.onnx", "model.onnx.data", "plan.json", RECIPE} <= names
    return [
        name for name in sorted(names - TOLD) if (first / name).read_bytes() != (second / name).read_bytes()
    ]


def check_plan(plan: Plan, promise: Promise) -> None:
    assert {site.form for site in plan.sites} == promise.forms
    if promise.formats:
        assert {site.quant for site in plan.sites} == promise.formats
        assert plan.table == promise.table
    assert promise.holds(plan)


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_keeps_its_promise_and_its_recipe_makes_the_bundle_again(
    name: str, llama: Path, quantized: Path, task: Path, tmp_path: Path, cli: Cli
) -> None:
    promise, model = PROMISES[name], quantized if name == "carry" else llama
    texts = ("--calibration-text", task) if promise.settings == BASEL else ()
    target = (f"basel.target={task}",) if promise.settings == BASEL else ()
    settings = ("calibration.tokens=512", *promise.settings, *target)
    words = [word for setting in settings for word in ("--set", setting)]
    first, again = tmp_path / "first", tmp_path / "again"
    ended = compressed(cli, model, first, name, *words)
    assert ended.code == 0, ended.err

    report = Report.load(first / "bundle" / "report.json")
    tiers = {tier.tier: tier.passed for tier in report.parity}
    assert tiers["c"] is True
    assert False not in tiers.values()
    assert not any("the budget was" in notice for notice in report.notices)
    plan = Plan.load(first / "bundle" / "plan.json")
    check_plan(plan, promise)
    assert load(first / "bundle" / RECIPE) == plan.recipe

    ended = compressed(cli, model, again, first / "bundle" / RECIPE, *texts)
    assert ended.code == 0, ended.err
    assert told_again(first / "bundle", again / "bundle") == []


@pytest.mark.parametrize(
    ("name", "settings"),
    [("int4", ("calibration.text={}",)), ("basel", ("basel.target={}", *BASEL))],
)
def test_a_recipe_with_a_text_needs_the_text_of_this_content(
    name: str, settings: tuple[str, ...], llama: Path, task: Path, tmp_path: Path, cli: Cli
) -> None:
    words = [word for text in settings for word in ("--set", text.format(task))]
    first, again = tmp_path / "first", tmp_path / "again"
    assert compressed(cli, llama, first, name, *words, "--set", "calibration.tokens=512").code == 0
    recipe = first / "bundle" / RECIPE
    written = recipe.read_text(encoding="utf-8")
    assert "name: task.txt" in written
    assert "sha256: " in written
    assert str(task.parent) not in written

    ended = compressed(cli, llama, again, recipe)
    assert ended.code == 2
    assert "task.txt" in ended.err
    assert "--calibration-text" in ended.err
    assert not (again / "bundle").exists()

    other = tmp_path / "task.txt"
    other.write_text("another text of the same name", encoding="utf-8")
    assert compressed(cli, llama, again, recipe, "--calibration-text", other).code == 2

    moved = tmp_path / "moved.txt"
    moved.write_bytes(task.read_bytes())
    ended = compressed(cli, llama, again, recipe, "--calibration-text", other, moved)
    assert ended.code == 0, ended.err
    assert told_again(first / "bundle", again / "bundle") == []

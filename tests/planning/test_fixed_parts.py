"""What surrounds the matrices: its bytes are those of the file, it has lines of its own, and it is in the refusals."""

from __future__ import annotations

import re
from collections import namedtuple
from pathlib import Path

import pytest
from conftest import Cli, tiny_options
from made_recipes import made_recipe, open_recipe
from tiny_models import FAMILIES

from rk_export import compress, dry_run, folders, make_plan
from rk_export.errors import InputError
from rk_export.graph.build import build_graph
from rk_export.methods.cap.options import CapOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.planning.fixed_parts import fixed_parts
from rk_export.planning.planner import decide_plan as plan_of
from rk_export.rewrite.apply import rewrite
from rk_export.rewrite.sizes import planned_bytes
from rk_export.source.stored import StoredModel

CONSTANTS = 600  # bytes of indices, axes and bounds that graph passes add
TEXT = CalibrationOptions(tokens=1024)
SIZED = made_recipe(calibration=TEXT)


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ep", ["cpu", "portable"])
def test_planned_bytes_are_those_of_the_graph(source_of: object, family: str, ep: str) -> None:
    """Norms, biases, routers, positions and frequencies are all counted, and once."""
    source: StoredModel = source_of(family)  # type: ignore[operator]
    plan = plan_of(source, tiny_options(groups=(), quant=None, table=None, ep=ep))
    model, _ = build_graph(rewrite(source, plan))
    values = [value.const_value for value in model.graph.initializers.values()]
    stored = sum(value.nbytes for value in values if value is not None)
    assert 0 <= stored - planned_bytes(source, plan) <= CONSTANTS


def test_every_kind_has_its_own_name(source_of: object) -> None:
    kinds = {
        family: {part.name for part in fixed_parts(source_of(family).description, SIZED)}  # type: ignore[operator]
        for family in ("llama", "qwen2", "gpt2", "mixtral", "bert")
    }
    everywhere = {"norms", "graph"}
    assert everywhere | {"rotary frequencies"} <= kinds["llama"]
    assert "biases" in kinds["qwen2"]
    assert "routers" in kinds["mixtral"]
    assert {"embeddings of positions", "biases"} <= kinds["gpt2"]
    assert "rotary frequencies" not in kinds["gpt2"] | kinds["bert"]


@pytest.mark.whole
@pytest.mark.usefixtures("made_up_rates")
def test_lines_of_the_dry_run_and_of_the_report(llama: Path, tmp_path: Path, cli: Cli) -> None:
    shown = cli("compress", llama, "-o", tmp_path / "out", "--dry-run", "--recipe", "int4")
    assert re.search(r"^norms .*stays in floats$", shown.out, re.MULTILINE)
    assert "the tables of 128 positions, 8.19 kB, are computed on loading" in shown.out
    report = compress(llama, tmp_path / "out", tiny_options(), run=Run(threads=1))
    planned = {finding.target: finding for finding in dry_run(llama, tiny_options()).findings}
    for name in ("norms", "rotary frequencies"):
        (told,) = [finding for finding in report.findings if finding.target == name]
        assert told == planned[name]


def forbid_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object, **__: object) -> None:
        pytest.fail("work began")

    monkeypatch.setattr("rk_export.commands.stages.compression_inputs", work)


def test_a_size_below_the_smallest_model_is_refused_before_work_with_all_parts(
    llama: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        forbid_work(patched)
        for extra in ((), ("--dry-run",)):
            ended = cli("compress", llama, "-o", tmp_path / "out", "--size", "90kB", *extra)
            assert ended.code == 2
            for part in (
                "90.0 kB are too few",
                "matrices and embedding",
                "norms",
                "rotary frequencies",
                "graph",
            ):
                assert part in ended.err
    advised = re.search(r"give at least ([\d.]+)MB", ended.err)
    assert advised is not None
    budget = Budget("size", float(advised[1]) * 1e6)
    assert make_plan(llama, open_recipe(budget, calibration=TEXT)).sites


def test_a_size_for_sparse_parts_names_what_they_do_not_replace(llama: Path) -> None:
    with pytest.raises(InputError, match=r"do not replace: embedding .* norms .* graph"):
        make_plan(llama, Recipe((CapOptions(size=50_000),)))


@pytest.mark.parametrize("extra", [(), ("--dry-run",), ("--keep", "0.9")])
def test_an_output_that_will_not_fit_is_refused_before_work(
    llama: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage(10_000, 9_800, 200))
    forbid_work(monkeypatch)
    ended = cli("compress", llama, "-o", tmp_path / "out", *extra)
    assert ended.code == 2
    assert "no space left on the disk" in ended.err
    assert "200 B are free" in ended.err


@pytest.mark.whole
def test_a_checkpoint_that_will_not_fit_is_refused(
    llama: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(llama, tmp_path / "out", tiny_options(), checkpoint=tmp_path / "kept", run=Run(threads=1))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage(10_000, 9_800, 200))
    monkeypatch.setattr("rk_export.commands.compress.write_bundle", None)
    ended = cli("export", tmp_path / "kept", "-o", tmp_path / "again")
    assert (ended.code, "no space left on the disk" in ended.err) == (2, True)

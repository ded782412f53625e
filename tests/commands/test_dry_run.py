"""A dry run reads headers only; what this machine has no room for is refused before any work."""

from __future__ import annotations

import json
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import Cli, tiny_options
from made_recipes import open_recipe

from rk_export import Budget, CalibrationOptions, HealOptions, InputError, compress, dry_run
from rk_export.commands import requirements
from rk_export.commands.machine_rates import machine_rates
from rk_export.planning.resources import KINDS
from rk_export.source.stored import StoredModel
from rk_export.source.tensor_files import SafetensorFiles

STAGES = ["load", "check", "calibrate", "plan", "rewrite", "export", "bundle", "verify"]
TEXT = CalibrationOptions(tokens=512)


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> None:
        pytest.fail("a tensor was read")

    monkeypatch.setattr(SafetensorFiles, "read", read)
    monkeypatch.setattr(StoredModel, "fingerprint", read)


def test_every_stage_has_a_line_and_no_tensor_is_read(
    llama: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch)
    ended = cli("compress", llama, "-o", tmp_path / "out", "--dry-run")
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    for stage in (*STAGES, "whole run"):
        assert [line for line in lines if line.startswith(f"{stage}  ")], stage
    assert any(line.startswith("memory  ") and "needed" in line for line in lines)
    assert any(line.startswith("disk of output") for line in lines)
    assert list(tmp_path.iterdir()) == []


def test_the_document_names_every_term(llama: Path, tmp_path: Path, cli: Cli) -> None:
    document = json.loads(cli("compress", llama, "-o", tmp_path / "out", "--dry-run", "--json").out)
    assert [stage["stage"] for stage in document["stages"]] == STAGES
    for stage in document["stages"]:
        on_disk = sum(term["bytes"] for term in stage["parts"] if term["place"] is not None)
        in_memory = sum(term["bytes"] for term in stage["parts"] if term["place"] is None)
        assert (on_disk, in_memory) == (stage["disk"], stage["memory"] + stage["gpu"])
    assert document["seconds"] == pytest.approx(sum(stage["seconds"] for stage in document["stages"]))
    assert set(document["rates"]) == set(KINDS)
    (disk,) = (
        document["room"]["disks"] if len(document["room"]["disks"]) == 1 else (document["room"]["disks"][0],)
    )
    assert disk["needed"] < disk["free"]


@pytest.mark.usefixtures("made_up_rates")
def test_a_budget_of_bytes_is_the_output(llama: Path) -> None:
    assert dry_run(llama, open_recipe(Budget("size", 400_000), calibration=TEXT)).output_bytes == 400_000


@pytest.mark.usefixtures("made_up_rates")
def test_a_method_that_recovers_is_a_stage_of_its_own(llama: Path) -> None:
    plain = tiny_options(calibration=TEXT)
    found = dry_run(llama, plain.with_step(HealOptions(steps=3, batch_tokens=256)))
    assert [stage.stage for stage in found.stages] == [*STAGES[:5], "heal", *STAGES[5:]]
    heal = found.stages[5]
    assert heal.memory > 0
    assert heal.seconds > 0


@pytest.mark.parametrize("extra", [(), ("--dry-run",)], ids=["compress", "dry-run"])
def test_too_little_memory_is_refused_before_work(
    llama: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, extra: tuple[str, ...]
) -> None:
    forbid(monkeypatch)
    monkeypatch.setattr(requirements, "available_memory", lambda: 1_000_000)
    ended = cli("compress", llama, "-o", tmp_path / "out", *extra)
    assert ended.code == 2
    assert "of memory, 1.00 MB are free" in ended.err
    assert "set calibration.tokens to fewer" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("made_up_rates")
def test_a_method_is_named_among_what_would_help(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requirements, "available_memory", lambda: 1_000_000)
    with pytest.raises(InputError, match="without heal"):
        dry_run(llama, tiny_options(calibration=TEXT).with_step(HealOptions(steps=3)))


@pytest.mark.parametrize("together", [True, False])
def test_folders_on_one_disk_are_summed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    monkeypatch.setattr(requirements, "cache_root", lambda: tmp_path / "cache")
    numbers = {tmp_path / "cache": 1, tmp_path / "out": 1 if together else 2}
    monkeypatch.setattr(requirements, "_file_system", lambda folder: numbers.get(folder, 3))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(requirements.shutil, "disk_usage", lambda _: usage(10_000, 9_800, 200))
    with pytest.raises(InputError, match="no space left on the disk") as caught:
        compress(llama, tmp_path / "out", open_recipe(Budget("size", 400_000), calibration=TEXT))
    assert ("output and cache" in caught.value.what) is together
    assert "another disk" in caught.value.fix
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rates_are_measured_for_every_kind_of_work(tmp_path: Path) -> None:
    rates = machine_rates(tmp_path / "not" / "yet", torch.device("cpu"), threads=1)
    assert set(rates) == set(KINDS)
    assert all(0 < rate < float("inf") for rate in rates.values())
    assert list(tmp_path.iterdir()) == []

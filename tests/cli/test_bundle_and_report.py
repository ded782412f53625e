"""The commands `bundle` and `report`."""

from __future__ import annotations

import json
import re
import webbrowser
from pathlib import Path

import pytest
from conftest import Cli
from deployable import write_deployable
from sample_report import full_report

from rk_export.bundle.targets import TARGETS
from rk_export.report.render import html, text_table


@pytest.fixture
def reported(tmp_path: Path) -> Path:
    """A folder with a report and its page."""
    folder = tmp_path / "spectra"
    folder.mkdir()
    full_report().save(folder / "report.json")
    (folder / "report.html").write_text(html(full_report()), encoding="utf-8")
    return folder


def test_every_target_is_listed_with_what_it_writes(cli: Cli) -> None:
    ended = cli("bundle", "--list")
    assert ended.code == 0
    for target in TARGETS:
        assert re.search(rf"^{re.escape(target.name)} +{re.escape(target.what)}", ended.out, re.M)
    assert json.loads(cli("bundle", "--list", "--json").out) == {one.name: one.what for one in TARGETS}


def test_targets_are_written_and_named(cli: Cli, tmp_path: Path) -> None:
    folder = write_deployable(tmp_path / "tiny")
    options = ("--name", "m", "--storage", "s3://bucket/m", "--image", "registry.example/m:1")
    ended = cli("bundle", folder, "--for", "triton,kserve", *options)
    assert (ended.code, ended.out.splitlines()) == (
        0,
        [f"triton  {folder / 'triton'}", f"kserve  {folder / 'kserve'}"],
    )
    manifest = (folder / "kserve" / "inferenceservice.yaml").read_text()
    assert "uri: s3://bucket/m\n" in manifest
    assert "image: registry.example/m:1\n" in manifest
    assert cli("bundle", folder, "--for", "triton").code == 2
    again = cli("bundle", folder, "--for", "triton", "--force", "--json")
    assert json.loads(again.out) == {"triton": str(folder / "triton")}
    assert (folder / "triton" / "tiny").is_dir()


@pytest.mark.parametrize("words", [(), ("somewhere",), ("--for", "triton")])
def test_a_bundle_and_targets_are_needed(cli: Cli, words: tuple[str, ...]) -> None:
    ended = cli("bundle", *words)
    assert ended.code == 2
    assert "a bundle and its targets are needed" in ended.err


def test_report_prints_what_compress_ends_with(cli: Cli, reported: Path) -> None:
    ended = cli("report", reported)
    assert (ended.code, ended.out) == (
        0,
        f"{text_table(full_report())}\n\nreport  {reported / 'report.html'}\n",
    )
    assert json.loads(cli("report", reported, "--json").out) == full_report().to_json()


def test_report_opens_the_page(cli: Cli, reported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address)) or True)
    assert cli("report", reported, "--open").code == 0
    assert opened == [(reported / "report.html").as_uri()]


def test_report_says_that_there_is_no_browser_or_page(
    cli: Cli, reported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webbrowser, "open", lambda address: False)
    ended = cli("report", reported, "--open")
    assert (ended.code, "no browser was found" in ended.err) == (2, True)
    (reported / "report.html").unlink()
    assert "report.html is not in this folder" in cli("report", reported).out
    ended = cli("report", reported, "--open")
    assert (ended.code, "there is no page to open" in ended.err) == (2, True)


def test_report_of_another_folder_is_refused(cli: Cli, tmp_path: Path) -> None:
    ended = cli("report", tmp_path)
    assert ended.code == 2
    assert "neither a bundle nor a folder of spectra" in ended.err

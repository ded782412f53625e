"""Every option of every command does something: the result changes, or the command refuses the value.

The parser says which options there are. One that has no entry in `CASES` fails, and so does an entry of an option that
is gone. `--json` and `--quiet` belong to all commands and are tested in `test_output_options.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TEMPLATE, Cli, Ended, tiny_options
from signing_keys import write_keys

from rk_export import (
    CalibrationOptions,
    Recipe,
    Run,
    TextFile,
    compare,
    comparison_html,
    compress,
    make_plan,
)
from rk_export.cli.parser import build_parser
from rk_export.signature import sign_bundle
from rk_export.work_folder import work_folder_of

pytestmark = [pytest.mark.whole, pytest.mark.slow]

Places = dict[str, Path]
COMMON = {"--json", "--quiet"}
# Their options are tested in `test_bundle_and_report.py`: one opens a browser, the other writes into its bundle. Those
# of the third remove things: `test_cache.py` gives them a cache of their own. The last one runs until it is ended:
# `test_serve.py`.
ELSEWHERE = {"report", "bundle", "cache", "serve"}


@dataclass(frozen=True)
class Seen:
    """What a command left."""

    ended: Ended
    files: dict[str, bytes]

    @property
    def document(self) -> Any:
        return json.loads(self.ended.out)


Effect = Callable[[Seen, Seen], None]  # without the option, with it


@dataclass(frozen=True)
class Case:
    """An option with a value that differs from the default's.

    Args:
        words: What is added to the line.
        effect: What must be seen.
        line: The line without the option; None takes that of the command in `LINES`.
        exists: An output of ours is there already.
        unfinished: A run of another model to the same output was interrupted.
    """

    words: tuple[object, ...]
    effect: Effect
    line: tuple[object, ...] | None = None
    exists: bool = False
    unfinished: bool = False


def prints_other(plain: Seen, changed: Seen) -> None:
    assert (plain.ended.code, changed.ended.code) == (0, 0), changed.ended.err
    assert changed.ended.out != plain.ended.out


def writes_other(plain: Seen, changed: Seen) -> None:
    assert (plain.ended.code, changed.ended.code) == (0, 0), changed.ended.err
    # Reports say when they were made.
    dated = {"report.json", "report.html", "rk_manifest.json"}
    assert {name: text for name, text in changed.files.items() if name not in dated} != {
        name: text for name, text in plain.files.items() if name not in dated
    }


def estimates_other(plain: Seen, changed: Seen) -> None:
    """Compare dry runs by what does not depend on the moment."""
    assert (plain.ended.code, changed.ended.code) == (0, 0), changed.ended.err
    fields = ("stages", "output_bytes", "findings", "notices")
    found, other = ({name: seen.document[name] for name in fields} for seen in (plain, changed))
    assert _without_floats(other) != _without_floats(found)


def measures_other(plain: Seen, changed: Seen) -> None:
    """Compare documents whose floats are times."""
    assert (plain.ended.code, changed.ended.code) == (0, 0), changed.ended.err
    assert _without_floats(changed.document) != _without_floats(plain.document)


def _without_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_floats(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_floats(item) for item in value]
    return None if isinstance(value, float) else value


def allows(plain: Seen, changed: Seen) -> None:
    assert (plain.ended.code, changed.ended.code) == (2, 0), changed.ended.err
    assert "--force" in plain.ended.err


def begins_anew(plain: Seen, changed: Seen) -> None:
    assert (plain.ended.code, changed.ended.code) == (2, 0), changed.ended.err
    assert "--no-resume" in plain.ended.err


def refused(why: str) -> Effect:
    def effect(plain: Seen, changed: Seen) -> None:
        assert (plain.ended.code, changed.ended.code) == (0, 2)
        assert why in changed.ended.err

    return effect


def finds(plain: Seen, changed: Seen) -> None:
    assert (plain.ended.code, changed.ended.code) == (2, 0), changed.ended.err
    assert "--calibration-text FILE" in plain.ended.err


LINES: dict[str, tuple[object, ...]] = {
    "compress": (
        "{llama}",
        "-o",
        "{out}",
        "--recipe",
        "floats",
        "--set",
        "calibration.tokens=512",
        "--dry-run",
        "--json",
    ),
    "analyze": ("{llama}", "-o", "{out}", "--recipe", "joint-rank"),
    "plan": ("{llama}", "-o", "{out}/plan.json", "--recipe", "joint-rank"),
    "recipes": (),
    "prepare": ("{llama}", "-o", "{out}", "--passes", "fold,rotate"),
    "export": ("{llama}", "-o", "{out}", "--threads", 1),
    "verify": ("{bundle}", "--threads", 1, "--provider", "cpu"),
    "sign": ("{signed}",),
    "eval": ("{bundle}", "--text", "{prose}", "--context", 64, "--tokens", 128, "--threads", 1),
    "run": ("{bundle}", "-p", "The harbour", "--max-new-tokens", 8, "--provider", "cpu"),
    "bench": ("{bundle}", "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "--json"),
    "compare": (
        "{bundle}",
        "{of_text}",
        "--text",
        "{prose}",
        "--context",
        64,
        "--tokens",
        128,
        "--threads",
        1,
    ),
}
SAMPLED = (*LINES["run"], "--temperature", 2, "--seed", 1)
CHAT = (*LINES["run"], "--chat")
NO_BASE = Case(("--base", "{llama}"), refused("goes with a LoRA adapter"))
NO_PROVIDER = Case(("--provider", "tpu"), refused("tpu"))
NO_THREADS = Case(("--threads", 0), refused("threads: 0 is out of range"))
NO_DEVICE = Case(("--device", "tpu"), refused("unknown device 'tpu'"))
NO_LIMIT = Case(("--cache-limit", "much"), refused("'much' is no size"))
NO_PLAN = Case(("--plan", "{plan}"), refused("a plan already holds its recipe"))
WHOLE = ("{llama}", "-o", "{out}", "--recipe", "floats", "--threads", 1)
OF_TEXT = ("{llama}", "-o", "{out}", "--recipe", "{of_text}/recipe.yaml")
AMOUNT_IN_STEP = refused("the recipe already says how much stays")

CASES: dict[tuple[str, str], Case] = {
    ("compress", "--base"): NO_BASE,
    ("compress", "--force"): Case(("--force",), allows, exists=True),
    ("compress", "--no-resume"): Case(
        ("--no-resume",), begins_anew, line=("{llama}", "-o", "{out}", "--recipe", "floats"), unfinished=True
    ),
    ("compress", "--recipe"): Case(("--recipe", "int8"), estimates_other),
    ("compress", "--set"): Case(("--set", "quantize.bits=8"), estimates_other),
    ("compress", "--size"): Case(("--size", "380KB"), estimates_other),
    ("compress", "--keep"): Case(("--keep", 0.6), estimates_other),
    ("compress", "--mean-bits"): Case(("--mean-bits", 8), estimates_other),
    ("compress", "--speed-up"): Case(("--speed-up", 1.2), refused("that are timed")),
    ("compress", "--ep"): Case(("--ep", "portable"), estimates_other),
    ("compress", "--plan"): NO_PLAN,
    ("compress", "--dry-run"): Case(("--dry-run",), writes_other, line=WHOLE),
    ("compress", "--checkpoint"): Case(("--checkpoint", "{out}"), refused("Fix: "), line=WHOLE),
    ("compress", "--device"): NO_DEVICE,
    ("compress", "--threads"): Case(("--threads", 0), refused("threads: 0 is out of range"), line=WHOLE),
    ("compress", "--workers"): Case(("--workers", 0), refused("0 is out of range")),
    ("compress", "--ray"): Case(("--ray", "127.0.0.1:1"), refused("--ray"), line=WHOLE),
    ("compress", "--cache-limit"): NO_LIMIT,
    ("compress", "--calibration-text"): Case(
        ("--calibration-text", "{moved}"), finds, line=(*OF_TEXT, "--dry-run")
    ),
    ("analyze", "--base"): NO_BASE,
    ("analyze", "--force"): Case(("--force",), allows, exists=True),
    ("analyze", "--recipe"): Case(("--recipe", "floats"), writes_other),
    ("analyze", "--set"): Case(("--set", "factorize.keep=0.5"), writes_other),
    ("analyze", "--size"): Case(("--size", "600KB"), AMOUNT_IN_STEP),
    ("analyze", "--keep"): Case(("--keep", 0.5), writes_other),
    ("analyze", "--mean-bits"): Case(("--mean-bits", 4), AMOUNT_IN_STEP),
    ("analyze", "--speed-up"): Case(("--speed-up", 2), AMOUNT_IN_STEP),
    ("analyze", "--plan"): NO_PLAN,
    ("analyze", "--device"): NO_DEVICE,
    ("analyze", "--threads"): NO_THREADS,
    ("analyze", "--cache-limit"): NO_LIMIT,
    ("analyze", "--calibration-text"): Case(("--calibration-text", "{moved}"), finds, line=OF_TEXT),
    ("plan", "--base"): dataclasses.replace(NO_BASE, exists=True),
    ("plan", "--force"): Case(
        ("--force",), allows, line=("{llama}", "-o", "{plan}", "--recipe", "joint-rank")
    ),
    ("plan", "--recipe"): Case(("--recipe", "floats"), writes_other, exists=True),
    ("plan", "--set"): Case(("--set", "factorize.keep=0.5"), writes_other, exists=True),
    ("plan", "--size"): Case(("--size", "600KB"), AMOUNT_IN_STEP, exists=True),
    ("plan", "--keep"): Case(("--keep", 0.5), writes_other, exists=True),
    ("plan", "--mean-bits"): Case(("--mean-bits", 4), AMOUNT_IN_STEP, exists=True),
    ("plan", "--speed-up"): Case(("--speed-up", 2), AMOUNT_IN_STEP, exists=True),
    ("plan", "--ep"): Case(("--ep", "portable"), writes_other, exists=True),
    ("plan", "--device"): dataclasses.replace(NO_DEVICE, exists=True),
    ("plan", "--threads"): dataclasses.replace(NO_THREADS, exists=True),
    ("plan", "--cache-limit"): dataclasses.replace(NO_LIMIT, exists=True),
    ("plan", "--calibration-text"): Case(
        ("--calibration-text", "{moved}"),
        finds,
        line=("{llama}", "-o", "{out}/plan.json", "--recipe", "{of_text}/recipe.yaml"),
        exists=True,
    ),
    ("recipes", "--steps"): Case(("--steps",), prints_other),
    ("recipes", "--schema"): Case(("--schema",), prints_other),
    ("compare", "--output"): Case(("-o", "{out}/page.html"), writes_other, exists=True),
    ("compare", "--force"): Case(("--force",), allows, line=("{bundle}", "{of_text}", "-o", "{page}")),
    ("compare", "--text"): Case(("--text", "{moved}"), prints_other),
    ("compare", "--tasks"): Case(("--tasks", "{task}"), prints_other),
    ("compare", "--limit"): Case(
        ("--limit", 1), prints_other, line=("{bundle}", "{of_text}", "--tasks", "{task}")
    ),
    ("compare", "--speed"): Case(("--speed",), prints_other),
    ("compare", "--base"): NO_BASE,
    ("compare", "--context"): Case(("--context", 32), prints_other),
    ("compare", "--tokens"): Case(("--tokens", 64), prints_other),
    ("compare", "--provider"): NO_PROVIDER,
    ("compare", "--threads"): NO_THREADS,
    ("prepare", "--base"): NO_BASE,
    ("prepare", "--force"): Case(("--force",), allows, exists=True),
    ("prepare", "--passes"): Case(("--passes", "fold"), writes_other),
    ("prepare", "--seed"): Case(("--seed", 1), writes_other),
    ("prepare", "--device"): Case(("--device", "tpu"), refused("unknown device 'tpu'")),
    ("export", "--base"): NO_BASE,
    ("export", "--force"): Case(("--force",), allows, exists=True),
    ("export", "--ep"): Case(("--ep", "portable"), writes_other),
    ("export", "--context-length"): Case(("--context-length", 64), writes_other),
    ("export", "--threads"): NO_THREADS,
    ("verify", "--key"): Case(
        ("--key", "{stranger}"),
        refused("is not that of"),
        line=("{signed}", "--threads", 1, "--provider", "cpu"),
    ),
    ("verify", "--against"): Case(("--against", "{llama}"), prints_other),
    ("verify", "--base"): Case(("--base", "{llama}"), refused("goes with --against")),
    ("verify", "--provider"): NO_PROVIDER,
    ("verify", "--device"): Case(("--device", "tpu", "--against", "{llama}"), refused("unknown device")),
    ("verify", "--threads"): NO_THREADS,
    ("verify", "--cache-limit"): NO_LIMIT,
    ("verify", "--calibration-text"): Case(
        ("--calibration-text", "{moved}"),
        prints_other,
        line=("{of_text}", "--against", "{llama}", "--threads", 1),
    ),
    ("eval", "--base"): NO_BASE,
    ("eval", "--text"): Case(("--text", "{moved}"), prints_other),
    ("eval", "--context"): Case(("--context", 32), prints_other),
    ("eval", "--tokens"): Case(("--tokens", 64), prints_other),
    ("eval", "--tasks"): Case(("--tasks", "{task}"), prints_other),
    ("eval", "--limit"): Case(("--limit", 1), prints_other, line=("{bundle}", "--tasks", "{task}")),
    ("eval", "--provider"): NO_PROVIDER,
    ("eval", "--threads"): NO_THREADS,
    ("run", "--prompt"): Case(("-p", "The train"), prints_other),
    ("run", "--pair"): Case(("--pair", "The train"), refused("goes with classifiers")),
    ("run", "--chat"): Case(("--chat",), prints_other),
    ("run", "--system"): Case(("--system", "Be brief."), prints_other, line=CHAT),
    ("run", "--template-arg"): Case(
        ("--template-arg", 'mood="merry"'), prints_other, line=("{moody}", *CHAT[1:])
    ),
    ("run", "--max-new-tokens"): Case(("--max-new-tokens", 4), prints_other),
    ("run", "--temperature"): Case(("--temperature", 2, "--seed", 1), prints_other),
    ("run", "--top-k"): Case(("--top-k", 1), prints_other, line=SAMPLED),
    ("run", "--top-p"): Case(("--top-p", 0.001), prints_other, line=SAMPLED),
    ("run", "--min-p"): Case(("--min-p", 1), prints_other, line=SAMPLED),
    ("run", "--repetition-penalty"): Case(("--repetition-penalty", 9), prints_other),
    ("run", "--stop"): Case(("--stop", "{text}"), prints_other),
    ("run", "--stop-token-id"): Case(("--stop-token-id", "{token}"), prints_other),
    ("run", "--seed"): Case(("--seed", 2), prints_other, line=SAMPLED),
    ("run", "--provider"): NO_PROVIDER,
    ("run", "--threads"): NO_THREADS,
    ("bench", "--against"): Case(("--against", "{bundle}"), measures_other),
    ("bench", "--prompt-tokens"): Case(("--prompt-tokens", 9), measures_other),
    ("bench", "--text"): Case(("--text", "{prose}"), measures_other),
    ("bench", "--new-tokens"): Case(("--new-tokens", 3), measures_other),
    ("bench", "--repeats"): Case(("--repeats", 2), measures_other),
    ("bench", "--provider"): NO_PROVIDER,
    ("bench", "--threads"): Case(("--threads", 1), measures_other),
}


def options() -> list[tuple[str, str]]:
    """Return every option of every command by its longest name; those that must be given are in every line."""
    (choice,) = (item for item in build_parser()._actions if isinstance(item, argparse._SubParsersAction))
    return [
        (command, max(action.option_strings, key=len))
        for command, parser in choice.choices.items()
        for action in parser._actions
        if action.option_strings and not action.required and action.dest != "help"
    ]


def test_every_option_has_a_case() -> None:
    assert set(CASES) == {key for key in options() if key[1] not in COMMON and key[0] not in ELSEWHERE}


@pytest.fixture(scope="module")
def places(
    llama: Path, bundle: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, object]:
    """What the lines name: models, bundles, texts; and what the bundle answers to the prompt."""
    from rk_export.runtime import GenerationOptions, Session

    folder = tmp_path_factory.mktemp("every-option")
    text = folder / "text.txt"
    text.write_text(prose.read_text("utf-8").swapcase() * 8, encoding="utf-8")
    calibration = CalibrationOptions(TextFile.of(text), tokens=512)
    compress(llama, folder / "of-text", tiny_options(calibration=calibration), run=Run(threads=1))
    moved = text.rename(folder / "moved.txt")
    make_plan(llama, Recipe.load("joint-rank")).save(folder / "plan.json")
    page = folder / "page.html"
    page.write_text(comparison_html(compare([bundle, folder / "of-text"])), encoding="utf-8")
    task = folder / "sums.jsonl"
    item = {"context": "2 + 2 =", "choices": ["4", "5"]}
    task.write_text("\n".join(json.dumps({**item, "gold": gold}) for gold in (0, 1)), encoding="utf-8")
    moody = Path(shutil.copytree(bundle, folder / "moody"))
    (moody / "chat_template.jinja").write_text(TEMPLATE + "{{ mood }}", encoding="utf-8")
    signed, (key, _) = Path(shutil.copytree(bundle, folder / "signed")), write_keys(folder)
    sign_bundle(signed, key)
    session = Session.from_pretrained(bundle, provider="cpu")
    answer = session.generate("The harbour", options=GenerationOptions(max_new_tokens=8))[0]
    return {
        **{"llama": llama, "bundle": bundle, "prose": prose, "of_text": folder / "of-text"},
        **{"moved": moved, "task": task, "moody": moody, "plan": folder / "plan.json", "page": page},
        **{"signed": signed, "key": key, "stranger": write_keys(folder, "stranger")[1]},
        **{"text": answer.text[2:4], "token": answer.token_ids[3]},
    }


@pytest.fixture(scope="module")
def seen() -> dict[object, Seen]:
    """What lines without the option left: many options share one."""
    return {}


@pytest.mark.parametrize(("command", "option"), CASES, ids=lambda part: part)
def test_it_does_something(
    cli: Cli,
    places: dict[str, object],
    seen: dict[object, Seen],
    tmp_path: Path,
    command: str,
    option: str,
) -> None:
    case = CASES[command, option]
    plain = LINES[command] if case.line is None else case.line

    def run(words: tuple[object, ...]) -> Seen:
        out = tmp_path / "out"
        for folder in (out, work_folder_of(out)):
            shutil.rmtree(folder, ignore_errors=True)
        if case.exists:
            out.mkdir()
            (out / "report.json").write_text("{}")
        if case.unfinished:
            work_folder_of(out).mkdir()
            (work_folder_of(out) / "run.json").write_text('{"the model": "another"}')
        ended = cli(command, *(str(word).format_map({**places, "out": out}) for word in words))
        return Seen(
            ended,
            {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()},
        )

    key = (command, plain, case.exists, case.unfinished)
    if key not in seen:
        seen[key] = run(plain)
    case.effect(seen[key], run((*plain, *case.words)))

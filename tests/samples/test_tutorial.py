"""Every command of the tutorial does what the page says, on a tiny model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import VOCABULARY, Cli, trained_tokenizer
from tiny_models import tiny_model

from rk_export.plan import Plan
from rk_export.runtime import Session

pytestmark = pytest.mark.whole

TUTORIAL = Path(__file__).parents[2] / "docs" / "tutorial.md"
# What the page says of a real model, said of a tiny one.
INSTEAD = {"90MB": "0.21MB"}


def commands() -> Iterator[list[str]]:
    """Yield the words of every command of rk-export on the page."""
    page = TUTORIAL.read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```$", page, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("rk-export"):
                yield shlex.split(line)[1:]


def test_the_tutorial(cli: Cli, prose: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "tiny"
    tiny_model("llama", vocab_size=VOCABULARY, max_position_embeddings=1024).save_pretrained(model)
    trained_tokenizer().save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    known = {"MODEL": str(model), "TEXT": str(prose), **INSTEAD}
    shown = []
    for words in commands():
        if words[0] == "doctor":
            continue  # it judges the machine, not the page
        *words, target = words if words[-2:-1] == [">"] else [*words, ""]
        ended = cli(*(known.get(word, word) for word in words if word != ">"))
        assert ended.code == 0, f"{shlex.join(words)}\n{ended.err}"
        if target:
            Path(target).write_text(ended.out, encoding="utf-8")
        shown.append((words, ended.out))
    assert {words[0] for words, _ in shown} >= {"compress", "plan", "eval", "compare", "run", "verify"}
    plan = Plan.load(Path("plan.json"))
    assert len({site.quant for site in plan.sites}) > 1  # some have 8 bits, some have 4
    assert json.loads(Path("out/first/plan.json").read_text(encoding="utf-8")) == plan.to_json()
    assert Path("out/compare.html").is_file()
    assert Session.from_pretrained("out/first").chat([{"role": "user", "content": "Where?"}]).text

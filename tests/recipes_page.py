"""Writes docs/reference/recipes.md from the presets and the steps' own documentation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rk_export.options.kinds import step_kinds
from rk_export.recipes import presets
from rk_export.recipes.fields import SectionHelp, section_help
from rk_export.recipes.tables import presets_table
from rk_export.report.table import Column, Table

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "recipes.md"

_HEAD = """# Recipes

A *recipe* is the ordered list of what is done to the weights of a model. You name a preset, or a file of your own:

```bash
rk-export compress MODEL -o out/bundle                            # the preset `default`
rk-export compress MODEL -o out/bundle --recipe int8              # another preset
rk-export compress MODEL -o out/bundle --recipe mine.yaml         # a file
rk-export compress MODEL -o out/bundle --set heal.steps=100       # one field changed, or one step added
```

`rk-export recipes` lists the presets. `rk-export recipes cap > mine.yaml` writes one to edit.
`rk-export recipes --steps` prints the tables below. `rk-export recipes --schema` prints a JSON schema, with which an
editor completes names and marks mistakes.

This page is written from the code by `RK_UPDATE_DOCS=1 pytest tests/recipes/test_recipes_page.py`.

## A recipe file

```yaml
calibration: {text: self, tokens: 8192}
steps:
  - prune: {blocks: 2, ffn_keep: 0.9}
  - prepare: [fold, rotate-heads]
  - cap: {keep: 0.5, selector: policy, steps: 100}
  - quantize: {targets: layers, bits: 4, block: 32, with: gptq}
  - quantize: {targets: [embed_tokens, lm_head], bits: 8}
  - heal: {steps: 100}
```

The steps stand in the order in which they work: {order}. `prune` and `prepare` may change places, because
preparations are exact. Only `quantize` may stand more than once: where two steps name the same matrix, the later one
holds. At most one step decides what stays of every matrix: {deciding}.

Beside `steps` a recipe may have `calibration`, `budget` and `target`. `about` says what the recipe is for.
The path of a text starts at the folder of the recipe file, or at the present folder.

A mistake ends with one error that names line and column:

```
mine.yaml:4:11: cap.kep: there is no such field
Fix: did you mean keep? known here: keep, size, selector, steps, ...
```

## How much stays

`--size`, `--keep`, `--mean-bits` and `--speed-up` set the amount, and a recipe holds only one.

- A step that says itself how much stays (`cap`, `sslc`, `basel`, `factorize` with an amount) gets the new amount.
- Otherwise the amount becomes the `budget` of the recipe. It decides whatever the steps leave open: ranks of
  `factorize`, and formats of `quantize` with `bits: auto`.
- A recipe that leaves nothing open gets a step `factorize`, and a line says so.

## What a bundle keeps

Every bundle holds `recipe.yaml`: the recipe with all fields and all decisions that do not depend on single matrices.
With the same model it makes the same bundle again, byte for byte, apart from the reports:

```bash
rk-export compress MODEL -o again/bundle --recipe out/bundle/recipe.yaml
```

A text of your own is noted by its name and its SHA-256. `--calibration-text FILE` then says where it lies.
"""


def page() -> str:
    """Return the whole page."""
    kinds = step_kinds()
    names = [f"`{kind.name}`" for kind in kinds]
    deciding = " or ".join(f"`{kind.name}`" for kind in kinds if kind.stage == "decide")
    head = _HEAD.replace("{order}", ", ".join(names)).replace("{deciding}", deciding)
    known = {name: preset.about for name, preset in presets().items()}
    parts = [head, "## Presets\n", presets_table(known).markdown(), "", *_files(), *_sections(section_help())]
    return "\n".join(parts).rstrip() + "\n"


def _files() -> Iterator[str]:
    yield "The files of some of them:\n"
    for name in ("default", "int4", "joint-rank"):
        yield f"```yaml\n{presets()[name].text.rstrip()}\n```\n"


def _sections(sections: tuple[SectionHelp, ...]) -> Iterator[str]:
    columns = (Column("field", "name"), Column("default", "name"))
    for section in sections:
        yield f"## `{section.name}`\n\n{section.help}\n"
        table = (
            Table(columns, tuple((one.name, one.default) for one in section.fields)).markdown().splitlines()
        )
        meanings = ["meaning", "---", *(one.help for one in section.fields)]
        yield "\n".join(f"{row} {meaning} |" for row, meaning in zip(table, meanings, strict=True)) + "\n"

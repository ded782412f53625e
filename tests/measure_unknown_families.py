"""What rk-export says of every type of transformers that writes text: known, taken as a known family, or refused.

    python tests/measure_unknown_families.py                        every type; ten minutes on one core
    python tests/measure_unknown_families.py --type 'exaone*' cwm   some of them; the rows of the others stay

A type that is taken as a family is exported as a tiny random model, and the bundle's logits are compared with those of
transformers' class of that type. Writes ``docs/results/unknown_families.json`` and ``unknown_families.md``. Ends with
status 1 if a bundle computes other logits.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from conftest import trained_tokenizer
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging as transformers_logging

from rk_export import RkExportError, Run, export
from rk_export.cli.main import quiet_libraries
from rk_export.manifest import library_versions
from rk_export.model.families.registry import FAMILIES
from rk_export.model.tiny_version import changed, random_model, tiny_version
from rk_export.model.unknown_families import taken_as
from rk_export.runtime import Session
from rk_export.source.read_as import read_as

TYPES = {**MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, **MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
RESULTS = Path(__file__).parents[1] / "docs" / "results"
TOLERANCE = 1e-5
_ROWS_OF_VOCABULARY = 320

logger = logging.getLogger("unknown families")


@dataclass(frozen=True)
class Row:
    """A type of transformers, and what becomes of it.

    Args:
        model_type: The type.
        model_class: transformers' class of it.
        outcome: `known`, `text model`, `taken` or `refused`.
        family: What it is read as; empty where it is refused.
        error: Of the bundle against the class, over the largest logit; None where nothing was exported.
        message: Why it is refused.
        hidden: Of a known type, what becomes of it where rk-export does not know it.
    """

    model_type: str
    model_class: str
    outcome: str
    family: str = ""
    error: float | None = None
    message: str = ""
    hidden: str = ""


def measure(model_type: str) -> Row:
    """Return what becomes of a type with the values that its config has by default."""
    model_class = str(TYPES[model_type])
    if model_type in FAMILIES and FAMILIES[model_type].decoder is not None:
        return measure_hidden(model_type, model_class)
    try:
        config = CONFIG_MAPPING[model_type]()
    except Exception as error:  # some classes refuse their own defaults
        return Row(model_type, model_class, "refused", message=f"its class takes no default config: {error}")
    try:
        read = read_as(config, Path("config.json"))
    except RkExportError as error:
        return Row(model_type, model_class, "refused", message=error.what)
    family = str(read.config.model_type)
    if read.taken is None:
        return Row(model_type, model_class, "text model" if read.wrapper else "known", family)
    return Row(model_type, model_class, "taken", family, exported_error(config))


def measure_hidden(model_type: str, model_class: str) -> Row:
    """Return what becomes of a known type, and what would if rk-export did not know it."""
    known = Row(model_type, model_class, "known", model_type)
    config = CONFIG_MAPPING[model_type]()
    with patch.dict(FAMILIES):
        del FAMILIES[model_type]
        try:
            family = str(taken_as(config).config.model_type)
        except RkExportError as error:
            return replace(known, hidden=_reason(error.what))
        return replace(known, error=exported_error(config), hidden=f"taken as `{family}`")


def exported_error(config: PretrainedConfig) -> float:
    """Export a tiny random model of a config; return the bundle's largest error over the largest logit."""
    tiny = changed(
        tiny_version(config), vocab_size=_ROWS_OF_VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0
    )
    model = random_model(tiny)
    ids = np.arange(3, 63, dtype=np.int64)[None]
    with TemporaryDirectory() as folder:
        source, bundle = Path(folder) / "model", Path(folder) / "bundle"
        model.save_pretrained(source)
        trained_tokenizer().save_pretrained(source)
        export(source, bundle, run=Run(threads=1))
        session = Session.from_pretrained(bundle, provider="cpu", threads=1)
        found = np.asarray(session.prefill_logits(ids))
    with torch.no_grad():
        expected = model(input_ids=torch.from_numpy(ids), use_cache=False).logits.numpy()
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def save(rows: Sequence[Row]) -> None:
    """Write the results, in the order of their names; rows of types that are gone are dropped."""
    path = RESULTS / "unknown_families.json"
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    by_type = {row["model_type"]: row for row in known} | {row.model_type: asdict(row) for row in rows}
    ordered = [by_type[name] for name in sorted(TYPES) if name in by_type]
    data = {"versions": library_versions(), "rows": ordered}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (RESULTS / "unknown_families.md").write_text(page(data), encoding="utf-8")


def page(data: dict[str, Any]) -> str:
    """Return the page of the results."""
    rows = [Row(**row) for row in data["rows"]]
    counts = Counter(row.outcome for row in rows)
    worst = max((row.error for row in rows if row.error is not None), default=0.0)
    lines = [
        _HEAD.format(
            count=len(rows),
            version=data["versions"].get("transformers", ""),
            known=counts["known"],
            parts=counts["text model"],
            taken=counts["taken"],
            refused=counts["refused"],
            worst=worst,
            tried=sum(bool(row.hidden) for row in rows),
            found=sum(row.hidden.startswith("taken") for row in rows),
        ),
        "| type | class | outcome | error | reason, or what becomes of it hidden |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        as_family = f" as `{row.family}`" if row.family not in ("", row.model_type) else ""
        error = "" if row.error is None else f"{row.error:.1e}"
        reason = row.hidden or _reason(row.message)
        lines.append(
            f"| `{row.model_type}` | `{row.model_class}` | {row.outcome}{as_family} | {error} | {_cell(reason)} |"
        )
    return "\n".join(lines) + "\n"


_HEAD = """# What becomes of every type of model that writes text

transformers {version} has {count} types of models that write text. This page lists each, with the default
values of its config, and what rk-export says of it. How a type is tried: [unknown model
types](../reference/inputs.md#unknown-model-types).

- *known*: {known}. They are [families](../../README.md#supported-families) of rk-export. As a test, {tried} of
  them were hidden from rk-export, one at a time. The last column says what became of each then. {found} of these were
  taken as another family.
- *text model*: {parts}. They read images or sound, and the text model in them is a known family. This column says what
  their config is read as; [tests](../../tests/tiny_wrappers.py) compare the logits of the usual ones.
- *taken*: {taken}. They are a known family in all but the name.
- *refused*: {refused}, each with what differs from the nearest family.

A tiny random model of each type that was taken, hidden or not, was exported as that family. The error is that of the
bundle against transformers' own class of the type. The largest is {worst:.1e} of the largest logit.

Encoders and models for translation, of which transformers also builds decoders, count as refused here.
Made by `python tests/measure_unknown_families.py`.
"""


def _reason(message: str) -> str:
    return message.partition("another name: ")[2] or message


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "\\<")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the types; return 1 if a bundle computes other logits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--type", nargs="+", default=["*"], metavar="PATTERN", help="types to measure")
    patterns = parser.parse_args(arguments).type
    logging.basicConfig(level=logging.ERROR, format="%(message)s")
    logger.setLevel(logging.INFO)
    quiet_libraries()
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for name in sorted(TYPES):
        if any(fnmatch(name, pattern) for pattern in patterns):
            rows.append(measure(name))
            logger.info("%s: %s %s %s", name, rows[-1].outcome, rows[-1].family, rows[-1].error or "")
    save(rows)
    return int(any(row.error is not None and row.error > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())

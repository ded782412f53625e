"""Makes docs/families.md of what the tests of families measured.

    RK_FAMILIES=all RK_FAMILIES_RESULTS=out/families python -m pytest tests/families    leaves one file a result
    python tests/families_page.py out/families                                          takes them over

Models that were not measured again keep what they have in ``docs/results/families.json``; the page is made from that
file alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from family_methods import PREPARED, RECIPES
from optimum_bundles import MODELS
from tiny_families import TABLE
from tiny_families.entry import TinyFamily

DOCS = Path(__file__).parents[1] / "docs"
DATA, PAGE = DOCS / "results" / "families.json", DOCS / "families.md"
Results = dict[str, dict[str, Any]]

_HEAD = """# Model families

Every family that rk-export takes, and how far its graph is from the model that transformers loads. A family that is
not here is refused before work begins.

`make families` measures all of this on tiny random models. In these every parameter is random, biases and norm gains
too, and windows, clips and caps are small enough to act. See
[testing](how-to/testing.md#families).

- **Error**: the largest difference of a logit in fp32, over the largest logit. It is the worst of prefill, cached
  steps, rows padded left and right, a mask with a hole, and requests in slots of the engine. The bound is 1e-5.
- **fp16**: the same for the portable graph, prefill alone.
- **Tokens**: greedy tokens of unequal requests that equal those of transformers, and those in ONNX Runtime GenAI.
- **Fields**: values of config fields that were tried. *Exact* ones change the model, and the graph follows. *Refused*
  ones are refused by name. All others change nothing.
- **–**: not measured."""
_METHODS = """
## Methods

✓ is exact: the graph computes what the compressed model computes in PyTorch (bound 1e-4), and a prepared graph what the
untouched model computes. A number is a reason below, why it is refused or left out.
"""
_REFUSED = """
## Options that are refused

Each value is one that was tried. Sizes of zero are left out here.
"""
# What the families take that people ask for most and that are refused so far.
_MISSING = {
    "gemma4_text": "embeddings for each layer, keys and values shared by layers, heads of two widths",
    "qwen3_5_text": "gated delta nets: `LinearAttention`, `CausalConvWithState` and their states in cache and engine",
    "gpt_oss": "attention sinks, experts with biases and a clamped gate, MXFP4 checkpoints",
    "deepseek_v3": "latent attention: low-rank queries and keys, values of another width",
    "granitemoehybrid with Mamba layers, nemotron_h": "selective state space layers and their states",
    "gemma3n": "several residual streams, embeddings for each layer",
    "t5, bart, whisper": "cross attention with a second cache, and three graphs",
}


def collected(folder: Path, results: Results) -> Results:
    """Return results with those of a folder in place of the same models' older ones."""
    found: Results = {}
    for path in sorted(folder.glob("*.json")):
        one = json.loads(path.read_text("utf-8"))
        found.setdefault(one["model"], {})[one["test"]] = _short(one["test"], one["values"])
    kept = {name: values for name, values in results.items() if name in _known()}
    return {name: {**kept.get(name, {}), **found.get(name, {})} for name in sorted({*kept, *found})}


def _known() -> set[str]:
    return {name for family in TABLE.values() for name in family.names}


def _short(test: str, values: Any) -> Any:
    """Return what the page shows of a result; of the refusals of one field, the first."""
    if test != "fields":
        return values
    refused: dict[str, list[str]] = {}
    for change, reason in values["refused"].items():
        place, _, value = change.partition("=")
        if value not in ("0", "0.0", "None") and not reason.endswith((" is 0", "at least 1")):
            refused.setdefault(place, [reason.removeprefix(f"{change}: "), value])[2:] = []
    return {"outcomes": values["outcomes"], "refused": {place: list(one) for place, one in refused.items()}}


def read(path: Path = DATA) -> Results:
    """Return what was measured, model by model."""
    found: Results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def page(results: Results) -> str:
    """Return the page of what was measured."""
    families = sorted(TABLE.values(), key=lambda family: family.model_type or family.name)
    decoders = [family for family in families if not family.is_encoder]
    encoders = [family for family in families if family.is_encoder]
    parts = [
        _HEAD,
        "\n## Decoders\n",
        *_table(decoders, results),
        "\n## Encoders\n",
        *_table(encoders, results),
        _METHODS,
        *_methods(decoders, results),
        _REFUSED,
        *_refusals(results),
        "\n## Runtimes\n",
        *_runtimes(results),
        "\n## What is missing\n",
        "| family | what it would take |\n| --- | --- |",
        *(f"| {name} | {what} |" for name, what in _MISSING.items()),
    ]
    return "\n".join(parts) + "\n"


def _table(families: list[TinyFamily], results: Results) -> Iterator[str]:
    yield "| family | models | error | fp16 | tokens | GenAI | fields exact, refused |"
    yield "| --- | --- | ---: | ---: | ---: | ---: | --- |"
    for family in families:
        for name in family.names:
            known = ", ".join(family.known) if name == family.name else ""
            yield f"| {_shown(name)} | {known} | {' | '.join(_figures(results.get(name, {})))} |"


def _shown(name: str) -> str:
    family, _, variant = name.partition(":")
    model_type = TABLE[family].model_type or family
    return f"`{model_type}`, {variant.replace('_', ' ')}" if variant else f"`{model_type}`"


def _figures(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield the cells of a model; a dash where nothing was measured."""
    bundle = values.get("bundle", {})
    errors = {**values.get("parity", {}), **bundle.get("errors", {})}
    yield f"{max(errors.values()):.0e}" if errors else "–"
    half = values.get("half precision")
    yield f"{half['error']:.0e}" if half else "–"
    yield f"{bundle['equal']} of {bundle['greedy tokens']}" if bundle else "–"
    yield str(values["genai"]["tokens"]) if "genai" in values else "–"
    outcomes = values.get("fields", {}).get("outcomes")
    yield f"{outcomes.get('exact', 0)}, {outcomes.get('refused', 0)}" if outcomes else "–"


def _methods(families: list[TinyFamily], results: Results) -> Iterator[str]:
    names = [name for family in families for name in family.names]
    tests = [*(f"method {name}" for name in RECIPES), *(f"preparation {name}" for name in PREPARED)]
    reasons: list[str] = []
    yield f"| family | {' | '.join(test.partition(' ')[2] for test in tests)} |"
    yield f"| --- |{' :---: |' * len(tests)}"
    for name in names:
        cells = (_method(name, results.get(name, {}).get(test), reasons) for test in tests)
        yield f"| {_shown(name)} | {' | '.join(cells)} |"
    yield ""
    yield from (f"{number}. {reason}" for number, reason in enumerate(reasons, 1))


def _method(name: str, values: Mapping[str, Any] | None, reasons: list[str]) -> str:
    if values is None:
        return "–"
    told = [values["refused"]] if "refused" in values else list(values.get("left out", {}).values())
    plain = [_plain(name, reason) for reason in told]
    reasons += [reason for reason in dict.fromkeys(plain) if reason not in reasons]
    numbers = sorted({reasons.index(reason) + 1 for reason in plain})
    return ", ".join(map(str, numbers)) or "✓"


def _plain(name: str, reason: str) -> str:
    """Return a reason without what is of one model."""
    family = TABLE[name.partition(":")[0]]
    model_type = family.model_type or family.name
    return re.sub(r"layer \d+ of the model has", "it has", reason.replace(model_type, "the model"))


def _refusals(results: Results) -> Iterator[str]:
    by_reason: dict[str, dict[str, list[str]]] = {}
    for name, values in results.items():
        for place, (reason, value) in values.get("fields", {}).get("refused", {}).items():
            said = reason.replace(value, "…") if len(value) > 3 else reason
            by_reason.setdefault(said, {}).setdefault(place, []).append(_shown(name))
    yield "| reason | fields | families |"
    yield "| --- | --- | --- |"
    for reason, places in sorted(by_reason.items()):
        families = sorted({family for names in places.values() for family in names})
        yield f"| {_cell(reason)} | {', '.join(f'`{place}`' for place in sorted(places))} | {', '.join(families)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", r"\|").split())


def _runtimes(results: Results) -> Iterator[str]:
    genai = sorted({_shown(name.partition(":")[0]) for name, values in results.items() if "genai" in values})
    optimum = ", ".join(sorted(_shown(name) for name in MODELS))
    yield "| runtime | what was compared | families |"
    yield "| --- | --- | --- |"
    yield "| ONNX Runtime, CPU | logits, engine, greedy tokens | all |"
    yield f"| ONNX Runtime GenAI | greedy tokens | {', '.join(genai)} |"
    yield f"| Optimum (`make test-optimum`) | greedy tokens, alone and in batches | {optimum} |"


def main(folder: str) -> None:
    """Take the results of a folder over, and write the page."""
    results = collected(Path(folder), read())
    DATA.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", "utf-8")
    PAGE.write_text(page(read()), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])

"""Runs the demo, and writes its figures to docs/results/front_page.* and into the front page.

python samples/measure/front_page.py            runs the demo first: minutes
python samples/measure/front_page.py --render   writes the pages from the figures that are there
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

import demo
from assets import smollm2, wiki_text
from measure import harness

from rk_export import library_versions

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- front_page: table -->\n).*?(<!-- front_page: end -->)", re.DOTALL)
NAMES = {"dense": "dense, fp32", "default": "default", "90MB": "`--size 90MB`", "w8a8": "`--recipe w8a8`"}


def measure(out: Path) -> dict[str, Any]:
    """Run every command of the demo; return the figures of its comparison and the seconds of each command."""
    args = demo.parse(["--out", str(out)])
    seconds, found = {}, {}
    for words, _ in demo.commands(args, smollm2(), wiki_text("eval")):
        start = time.perf_counter()
        if words[0] == "compare":
            command = [*demo.COMMAND, *words[:-2], "--json", "--threads", str(args.threads)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            found = json.loads(output)
        else:
            demo.type_in(words, shown=False, threads=args.threads)
        seconds[" ".join((words[0], *words[-2:])) if words[0] == "compress" else words[0]] = round(
            time.perf_counter() - start, 1
        )
    return {
        "machine": harness.machine(),
        "versions": library_versions(),
        "tokens": args.tokens,
        "seconds": {key.replace(str(out), "out/demo"): value for key, value in seconds.items()},
        "rows": [_row(model) for model in found["models"]],
    }


def _row(model: dict[str, Any]) -> dict[str, Any]:
    """Return the figures of one model that the front page shows."""
    score = next(one for one in model["scores"] if one["measure"] == "perplexity")
    verdicts = [tier["passed"] for tier in model["parity"] if tier["passed"] is not None]
    return {
        "name": model["name"],
        "file_bytes": model["file_bytes"],
        "perplexity": score["value"],
        "error": score["error"],
        "speed": model["speed"],
        "parity": [sum(verdicts), len(verdicts)],
    }


def table(figures: dict[str, Any]) -> str:
    """Return the rows as Markdown."""
    head = "| model | files | perplexity | prefill, tokens/s | decode, tokens/s | parity tiers passed |"
    lines = [head, "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in figures["rows"]:
        cells = (
            NAMES.get(row["name"], row["name"]),
            f"{row['file_bytes'] / 1e6:.1f} MB",
            f"{row['perplexity']:.2f} ± {row['error']:.2f}",
            f"{row['speed']['prefill']:.0f}",
            f"{row['speed']['decode']:.0f}",
            f"{row['parity'][0]} of {row['parity'][1]}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page(figures: dict[str, Any]) -> str:
    """Return the page of the results."""
    seconds = "\n".join(f"| `{name}` | {value:.0f} |" for name, value in figures["seconds"].items())
    return f"""# The demo in figures

`make demo` runs these commands on SmolLM2-135M-Instruct. The figures were measured by
`python samples/measure/front_page.py` on {figures["machine"]}, with an empty cache.

Perplexity is that of the first {figures["tokens"]:,} tokens of Wikipedia prose in windows of 512. ± is one standard
error over windows. Speeds were measured in turns.

{table(figures)}
| command | seconds |
| --- | ---: |
{seconds}
"""


def main(arguments: list[str] | None = None) -> int:
    """Measure, unless the figures are there, and write the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--render", action="store_true", help="only write the pages")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the demo")
    args = parser.parse_args(arguments)
    results = ROOT / harness.RESULTS
    if not args.render:
        figures = measure(args.out)
        (results / "front_page.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    figures = json.loads((results / "front_page.json").read_text(encoding="utf-8"))
    (results / "front_page.md").write_text(page(figures), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), figures), encoding="utf-8")
    return 0


def with_table(text: str, figures: dict[str, Any]) -> str:
    """Return the front page with the table of some figures."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(figures)}{found[2]}", text)


if __name__ == "__main__":
    sys.exit(main())

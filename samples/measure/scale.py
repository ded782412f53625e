"""What a compression takes of a machine: memory, time and disk by stage, for models of many sizes and depths.

    python samples/measure/scale.py                              every row; hours, and 40 GB of disk for the 7 B shape
    python samples/measure/scale.py --rows 135m '0.5b-*'         some of them
    python samples/measure/scale.py --rows 7b --set calibration.tokens=2048 --work /big/disk

A shape is a model with random weights (samples/measure/shapes.py): what a model costs depends on its shape. Each row is
one run of `rk-export compress` in a process of its own under the meter (memory_meter.py), with an empty cache, then
`rk-export verify` and `rk-export run` of the bundle. Rows of real models also have the perplexity of the
dense model and of the bundle, and beside them stands onnxruntime-genai's own INT4 builder, where that is installed. The
weights of the packaged models may lie on a 4-bit grid, which flatters every rounding; rows `...-off-grid` take a copy
that is exactly reparameterized first.

Run it on an idle machine. Writes docs/results/scale.json and scale.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from assets import qwen2_5_coder, smollm2, wiki_text
from measure import floors, harness, shapes, sweep
from measure.harness import Measure, Results, Row, Rows
from measure.memory_meter import Metered, metered

from rk_export import EvalText, InputError, Recipe, open_source, perplexity_of, prepare, torch_logits
from rk_export.runtime import Session

COMMAND = (sys.executable, "-m", "rk_export.cli.main")
SHAPES = ("mixture", "135m", "0.5b", "1.1b", "7b")
# What the peak of a shape should stay below, in GB.
GOALS = {"135m": 1.9, "0.5b": 3.0, "1.1b": 3.5, "7b": 8.0}
CURVE, DEPTHS = "0.5b", (4, 8, 16, 32)
SHALLOW = ("7b", 4)  # what a layer of a large model takes, in a fraction of its time
LARGE = ("7b",)  # model folders that are deleted after the run
REAL: dict[str, tuple[str, Callable[[], Path]]] = {
    "smollm2": ("SmolLM2-135M-Instruct", smollm2),
    "qwen": ("Qwen2.5-Coder-0.5B-Instruct", qwen2_5_coder),
}
OFF_GRID, PEER = "-off-grid", "genai-"
TOKENS, CONTEXT = 5120, 512
PROMPT, NEW_TOKENS = "The harbour was quiet in the early morning, and", 8


@dataclass(frozen=True)
class Scale:
    """Where and how the rows are measured.

    Args:
        work: Folder of models, caches and outputs.
        settings: `KEY=VALUE` of the recipe, for all rows.
        threads: Of PyTorch's and ONNX Runtime's products.
        keep: Leave large models and all outputs where they are.
    """

    work: Path
    settings: Sequence[str]
    threads: int
    keep: bool

    def rows(self) -> Iterator[tuple[str, Measure]]:
        """Yield every row, small ones first."""
        yield from ((shape, partial(self.shape, shape, None)) for shape in SHAPES[:-1])
        yield from ((depth_key(depth), partial(self.shape, CURVE, depth)) for depth in DEPTHS)
        for name in REAL:
            for key in (name, f"{name}{OFF_GRID}"):
                yield key, partial(self.real, key)
                if importlib.util.find_spec("onnxruntime_genai"):
                    yield f"{PEER}{key}", partial(self.peer, key)
        yield depth_key(SHALLOW[1], SHALLOW[0]), partial(self.shape, *SHALLOW)
        yield SHAPES[-1], partial(self.shape, SHAPES[-1], None)

    def shape(self, shape: str, layers: int | None) -> Row:
        """Measure a model of random weights, which is written where it is missing."""
        key = shape if layers is None else depth_key(layers, shape)
        folder = self.work / "models" / key
        if not folder.exists():
            shapes.write(folder, shape, layers=layers)
        row = {"kind": "shape", "shape": shape, **self.compression(key, folder, lambda _: {})}
        if shape in LARGE and not self.keep:
            shutil.rmtree(folder)
        return row

    def real(self, key: str) -> Row:
        """Measure a real model, and its perplexity before and after."""
        folder = self.real_folder(key)

        def quality(bundle: Path) -> Row:
            dense = perplexity(torch_logits(open_source(folder).load()), folder)
            return {"dense": dense, "perplexity": self.perplexity(bundle, folder)}

        return {"kind": "real", **self.compression(key, folder, quality)}

    def peer(self, key: str) -> Row:
        """Measure onnxruntime-genai's builder on the same model."""
        model, folder = self.real_folder(key), self.folder(f"{PEER}{key}")
        bundle = folder / "out"
        found = self.metered(harness.genai_builder(model, bundle), folder, [bundle])
        row = {
            "kind": "peer",
            "machine": harness.machine(),
            "compress": found.row(),
            "file_bytes": harness.model_bytes(bundle),
            "perplexity": self.perplexity(bundle, model),
        }
        self.clear(folder)
        return row

    def real_folder(self, key: str) -> Path:
        """Return the folder of a real model, or of its copy that is off the grid."""
        name = key.removesuffix(OFF_GRID)
        model = REAL[name][1]()
        if name == key:
            return model
        folder = self.work / "models" / key
        if not folder.exists():
            prepare(model, folder, sweep.OFF_GRID, seed=7)
        return folder

    def compression(self, key: str, model: Path, quality: Callable[[Path], Row]) -> Row:
        """Compress, verify and run, each under the meter."""
        folder = self.folder(key)
        speeds = floors.rates(self.work)
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        counts = floors.counts_of(config, model)
        bundle, cache = folder / "out", folder / "cache"
        threads = ("--threads", str(self.threads))
        changed = [word for setting in self.settings for word in words_of(setting)]
        compress = self.metered(
            [*COMMAND, "compress", str(model), "-o", str(bundle), "--device", "cpu", *threads, *changed],
            folder,
            [bundle, cache],
        )
        verify = self.metered([*COMMAND, "verify", str(bundle), *threads], folder, [bundle, cache])
        words = ["-p", PROMPT, "--max-new-tokens", str(NEW_TOKENS)]
        run = self.metered([*COMMAND, "run", str(bundle), *words, *threads], folder, [bundle, cache])
        size = harness.model_bytes(bundle)
        work = floors.stages(counts, tokens_of(self.settings), size)
        row = {
            "machine": harness.machine(),
            "set": list(self.settings),
            "layers": counts.layers,
            "stored_bytes": counts.stored,
            "file_bytes": size,
            "bound_bytes": floors.bound(counts),
            "rates": floors.row(speeds),
            "floors": {stage: one.seconds(speeds) for stage, one in work.items()},
            "compress": compress.row(),
            "verify": verify.row()["whole"],
            "run": run.row()["whole"],
            **quality(bundle),
        }
        self.clear(folder)
        return row

    def folder(self, key: str) -> Path:
        """Return the empty folder of a row."""
        folder = self.work / "runs" / key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def clear(self, folder: Path) -> None:
        """Delete what a row has made."""
        if not self.keep:
            shutil.rmtree(folder)

    def metered(self, command: Sequence[str], folder: Path, folders: Sequence[Path]) -> Metered:
        """Run a command under the meter with the row's own cache.

        Raises:
            InputError: It failed; what it took until then is logged.
        """
        env = os.environ | {"RK_EXPORT_CACHE": str(folder / "cache"), "ORT_DISABLE_TELEMETRY": "1"}
        found = metered(command, folders, env=env)
        if found.status:
            harness.logger.info("%s", found.table(steps=True))
            raise InputError(f"the command ended with {found.status}: {' '.join(command)}", where=str(folder))
        return found

    def perplexity(self, bundle: Path, model: Path) -> list[float]:
        """Return the perplexity of a bundle in ONNX Runtime, with its standard error."""
        session = Session.from_pretrained(bundle, provider="cpu", threads=self.threads)
        return perplexity(session.prefill_logits, model)


def perplexity(logits: Any, model: Path) -> list[float]:
    """Return the perplexity on English Wikipedia, with its standard error."""
    text = EvalText(wiki_text("eval"), CONTEXT, TOKENS)
    found = perplexity_of(logits, text, open_source(model).folder)
    return [round(found.perplexity, 4), round(found.perplexity_error, 4)]


def depth_key(layers: int, shape: str = CURVE) -> str:
    """Return the name of the row of a shape with that many layers."""
    return f"{shape}-{layers}-layers"


def words_of(setting: str) -> tuple[str, str]:
    """Return the arguments of `compress` that a setting stands for; `recipe=NAME` takes another recipe."""
    key, _, value = setting.partition("=")
    return ("--recipe", value) if key == "recipe" else ("--set", setting)


def tokens_of(settings: Sequence[str]) -> int:
    """Return how many tokens of text a recipe with these settings reads."""
    given = dict(setting.split("=", 1) for setting in settings)
    return int(given.get("calibration.tokens", Recipe.load("default").calibration.tokens))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing and write the results."""
    parser = harness.parser(__doc__, "rows")
    parser.add_argument("--work", type=Path, default=Path("out/scale"), help="folder of models and outputs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the recipe, such as calibration.tokens=2048, or recipe=int4 for another one; the rows note it",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="default %(default)s")
    parser.add_argument("--keep", action="store_true", help="leave large models and all outputs there")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure and report."""
    args.work.mkdir(parents=True, exist_ok=True)
    scale = Scale(args.work.resolve(), args.set, args.threads, args.keep)
    results = Results(args.out, "scale", {"threads": args.threads})
    results.measure(scale.rows(), args.rows)
    results.write_page(page(results))


def page(results: Results) -> str:
    """Return the results as Markdown."""
    rows = results.rows
    compressed = {key: row for key, row in rows.items() if row["kind"] != "peer"}
    curve = results.ordered(map(depth_key, DEPTHS))
    lines = [
        "# Scale",
        "",
        "This page shows which memory, time and disk a compression takes, for models of many sizes and depths.",
        "",
        f"Made by `python samples/measure/scale.py` with {results.facts['threads']} threads. A shape is a model with "
        "the sizes of a real one and random weights. Each row ran alone, with the default recipe and an empty cache. "
        "GB are 10⁹ bytes. The data, with the machine of each row, lies in `scale.json`.",
        "",
        "*Peak* is anonymous memory (RssAnon). Mapped files are not in it: the system may drop them. *Bound* is 1.5 "
        "GB, the embedding as it is stored, four copies of the largest layer in float32, and the moments of one layer. "
        "It does not grow with the depth. *Disk* is the work folder, the cache and the output together.",
        "",
        harness.reading(reading(compressed, curve, rows)),
    ]
    if compressed:
        lines += ["", "## Runs", "", runs(compressed)]
    if curve:
        lines += ["", "## Depth", "", runs(curve)]
    if any(row["kind"] != "shape" for row in rows.values()):
        lines += ["", "## Real models", "", *real_models(rows)]
    if compressed:
        lines += ["", "## Stages", "", *stages(compressed)]
    return "\n".join([*lines, ""])


def runs(rows: Rows) -> str:
    """Return the table of whole runs."""
    head = ("model", "layers", "files, GB", "peak, GB", "bound, GB", "goal, GB", "within", "disk, GB", "time")
    head += ("changed", "verify", "8 tokens")
    found = []
    for key, row in rows.items():
        whole, goal = row["compress"]["whole"], goal_of(row)
        found.append(
            [
                *(title(key), row["layers"], gigabytes(row["stored_bytes"]), gigabytes(whole["anon"])),
                *(gigabytes(row["bound_bytes"]), goal or "–", "yes" if is_within(row) else "**no**"),
                *(gigabytes(whole["disk"]), duration(whole["seconds"]), ", ".join(row["set"]) or "–"),
                *(duration(row[step]["seconds"]) for step in ("verify", "run")),
            ]
        )
    return harness.table(head, found, " rrrrr rr rr")


def stages(rows: Rows) -> Iterator[str]:
    """Yield the table of each row's stages, with what the text says of it."""
    yield (
        "*Floor* is the least time that the stage can take here: its products over the measured rate of their type, "
        "and its bytes over the rate of the disk. `samples/measure/floors.py` counts both. *Share* is the floor over "
        "the time."
    )
    for key, row in rows.items():
        rate = row["rates"]
        yield ""
        yield f"### {title(key)}"
        yield ""
        yield (
            f"Products: {rate['fp32'] / 1e9:.0f} GFLOP/s in float32, {rate['bf16'] / 1e9:.0f} in bfloat16, "
            f"{rate['ssyrk'] / 1e9:.0f} in symmetric updates. Disk: {rate['write'] / 1e6:.0f} MB/s written, "
            f"{rate['read'] / 1e6:.0f} MB/s read."
        )
        yield ""
        head = ("stage", "seconds", "floor", "share", "RssAnon, GB", "RssFile, GB", "disk, GB")
        cells = [
            [
                *(stage["stage"], f"{stage['seconds']:.1f}", *share(row, stage)),
                *(gigabytes(stage[kind]) for kind in ("anon", "file", "disk")),
            ]
            for stage in whole_stages(row)
        ]
        yield harness.table(head, cells, " rrrrrr")


def whole_stages(row: Row) -> list[Row]:
    """Return the stages of a row without their steps."""
    return [usage for usage in row["compress"]["usages"] if not usage["step"]]


def share(row: Row, stage: Row) -> tuple[str, str]:
    """Return the floor of a stage and its share of the time."""
    floor = row["floors"].get(stage["stage"])
    return ("–", "–") if floor is None else (f"{floor:.1f}", f"{100 * floor / stage['seconds']:.0f} %")


def real_models(rows: Rows) -> Iterator[str]:
    """Yield what is left of real models, beside the peer."""
    yield (
        f"Perplexity is measured on {TOKENS:,} tokens of English Wikipedia, in windows of {CONTEXT}. ± is one standard "
        "error over windows. The builder of onnxruntime-genai (GenAI) rounds to nearest. *Off the grid* is an exactly "
        "reparameterized copy: weights of the packaged model may lie on a 4-bit grid, where rounding costs nothing."
    )
    yield ""
    found = []
    for key, row in rows.items():
        if row["kind"] == "shape":
            continue
        whole = row["compress"]["whole"]
        before = rows.get(key.removeprefix(PEER), {}).get("dense")
        found.append(
            [
                title(key),
                "GenAI's builder" if row["kind"] == "peer" else "rk-export",
                duration(whole["seconds"]),
                gigabytes(whole["anon"]),
                f"{row['file_bytes'] / 1e6:.0f}",
                error_of(before),
                error_of(row["perplexity"]),
            ]
        )
    head = ("model", "made by", "time", "peak, GB", "file, MB", "dense perplexity", "perplexity")
    yield harness.table(head, found, "  rrrrr")


def reading(compressed: Rows, curve: Rows, rows: Rows) -> Iterator[str]:
    """Yield what the rows show."""
    if compressed:
        within = sum(map(is_within, compressed.values()))
        closest = max(compressed, key=lambda key: used(compressed[key]))
        yield (
            f"{within} of {len(compressed)} runs stayed within the bound. The nearest to it, or the furthest above, is "
            f"{title(closest)} with {100 * used(compressed[closest]):.0f} % of its bound."
        )
        missed = [title(key) for key, row in compressed.items() if not reaches_goal(row)]
        yield f"Above the goal: {', '.join(missed) or 'none'}."
    if len(curve) > 1:
        peaks = [row["compress"]["whole"]["anon"] for row in curve.values()]
        depths = [row["layers"] for row in curve.values()]
        yield (
            f"From {depths[0]} to {depths[-1]} layers of one width the peak went from {gigabytes(peaks[0])} to "
            f"{gigabytes(peaks[-1])} GB. The largest peak is {max(peaks) / min(peaks):.2f} times the smallest."
        )
    for key, row in compressed.items():
        if far := furthest(row):
            yield f"Furthest from their floors in {title(key)}: {'; '.join(far)}."
    for key, row in rows.items():
        peer = rows.get(f"{PEER}{key}")
        if peer is not None and "dense" in row:
            yield (
                f"{title(key)}: perplexity {row['perplexity'][0]:.2f} beside {row['dense'][0]:.2f} dense and "
                f"{peer['perplexity'][0]:.2f} of GenAI's builder, at {row['file_bytes'] / peer['file_bytes']:.2f} "
                f"times its file and {row['compress']['whole']['anon'] / peer['compress']['whole']['anon']:.2f} times "
                "its memory."
            )


def furthest(row: Row, count: int = 2) -> list[str]:
    """Return the stages that lose the most seconds over their floors."""
    lost = {
        stage["stage"]: stage["seconds"] - row["floors"][stage["stage"]]
        for stage in whole_stages(row)
        if stage["stage"] in row["floors"]
    }
    return [
        f"{stage}, {lost[stage]:.0f} s more" for stage in sorted(lost, key=lost.__getitem__)[::-1][:count]
    ]


def used(row: Row) -> float:
    """Return the peak over the bound."""
    return float(row["compress"]["whole"]["anon"] / row["bound_bytes"])


def is_within(row: Row) -> bool:
    """Whether a run stayed within the bound."""
    return used(row) <= 1


def goal_of(row: Row) -> float | None:
    """Return the goal of a row's shape in GB; None where it has none."""
    return GOALS.get(row.get("shape", ""))


def reaches_goal(row: Row) -> bool:
    """Whether a run stayed within the goal of its shape; one without a goal does."""
    goal = goal_of(row)
    return goal is None or row["compress"]["whole"]["anon"] <= goal * 1e9


def title(key: str) -> str:
    """Return how the page calls a row."""
    name = key.removeprefix(PEER)
    if name.removesuffix(OFF_GRID) not in REAL:
        return f"shape {name.replace('-', ', ', 1).replace('-', ' ')}"
    found = REAL[name.removesuffix(OFF_GRID)][0]
    return f"{found}, off the grid" if name.endswith(OFF_GRID) else found


def gigabytes(count: float) -> str:
    """Return bytes in GB with two digits behind the point."""
    return f"{count / 1e9:.2f}"


def duration(seconds: float) -> str:
    """Return a time in minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def error_of(value: Sequence[float] | None) -> str:
    """Return a perplexity with its standard error."""
    return "–" if value is None else f"{value[0]:.2f} ± {value[1]:.2f}"


if __name__ == "__main__":
    sys.exit(main())

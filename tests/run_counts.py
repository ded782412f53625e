"""What one compression costs beside its arithmetic: how often it reads, opens, hashes, parses and builds.

Run as a script it prints the counts of three compressions of a tiny Llama as JSON, without and with a cache::

    python tests/run_counts.py
"""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from made_recipes import made_recipe

from rk_export import compress, tensor_cache
from rk_export.methods.prune.options import PruneOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.quantization import W8A8
from rk_export.options.recipe import Recipe
from rk_export.options.run import Run
from rk_export.source import tensor_files

# What is counted -> the function that does it.
CALLS = {
    "describe": "rk_export.model.description.describe",
    "architecture_of": "rk_export.model.families.registry.architecture_of",
    "decoder_spec": "rk_export.model.families.registry.decoder_spec",
    "models on meta": "rk_export.model.torch_models.transformers_model",
    "graph modules": "rk_export.graph.dense.frontend.build_module",
    "files hashed": "rk_export.manifest.sha256_of",
}
# Methods that are counted, where this version has them.
KEPT = ("rk_export.source.memory", "Memory", "hold")
WEIGHTS = ".safetensors"


def counts_of_one_compress(model_folder: Path, recipe: Recipe) -> dict[str, int]:
    """Compress a model into a temporary folder and return how often each step was taken.

    What transformers reads for tier 0 is not counted: it is the reference that is not ours.

    Args:
        model_folder: A Hugging Face folder.
        recipe: What to do.
    """
    counts: Counter[str] = Counter()
    reads: Counter[str] = Counter()
    with (
        TemporaryDirectory() as folder,
        _counted_calls(counts),
        _counted_method(counts),
        _counted_files(counts, reads),
    ):
        compress(model_folder, Path(folder) / "out", recipe, run=Run(device="cpu", threads=1))
    counts["tensor reads"] = sum(reads.values())
    counts["most reads of one tensor"] = max(reads.values())
    counts["tensors"] = len(reads)
    return dict(sorted(counts.items()))


@contextmanager
def _counted_calls(counts: Counter[str]) -> Iterator[None]:
    """Put a counting function in place of each that is counted, wherever it was imported."""
    changed: list[tuple[Any, str, Any]] = []
    for what, dotted in CALLS.items():
        module, _, name = dotted.rpartition(".")
        try:
            function = getattr(importlib.import_module(module), name)
        except ModuleNotFoundError:
            continue
        counting = _counting(function, counts, what)
        for user in [user for name, user in sys.modules.items() if name.startswith("rk_export.")]:
            for attribute in [key for key, value in vars(user).items() if value is function]:
                changed.append((user, attribute, function))
                setattr(user, attribute, counting)
    try:
        yield
    finally:
        for user, attribute, function in changed:
            setattr(user, attribute, function)


@contextmanager
def _counted_method(counts: Counter[str]) -> Iterator[None]:
    """Count how often a whole model is kept in memory."""
    module, owner, name = KEPT
    try:
        kept = getattr(importlib.import_module(module), owner)
    except ModuleNotFoundError:
        yield
        return
    function = getattr(kept, name)
    setattr(kept, name, _counting(function, counts, "whole models kept"))
    try:
        yield
    finally:
        setattr(kept, name, function)


def _counting(function: Callable[..., Any], counts: Counter[str], what: str) -> Callable[..., Any]:
    counts[what] = 0

    @wraps(function)
    def counting(*arguments: Any, **named: Any) -> Any:
        # Layers of the run itself are hashed too.
        path = str(arguments[0]) if arguments else ""
        if what != "files hashed" or (path.endswith(WEIGHTS) and ".work" not in path):
            counts[what] += 1
        return function(*arguments, **named)

    return counting


@contextmanager
def _counted_files(counts: Counter[str], reads: Counter[str]) -> Iterator[None]:
    """Count the safetensors files that are opened and the tensors that are read from them."""
    opens = tensor_files.safe_open

    class Counted:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            counts["file opens"] += 1
            self._file = opens(*arguments, **named)

        def __enter__(self) -> Any:
            self._file.__enter__()
            return self

        def __exit__(self, *error: object) -> None:
            self._file.__exit__(*error)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_tensor(self, name: str) -> Any:
            reads[name] += 1
            return self._file.get_tensor(name)

    tensor_files.safe_open = Counted
    try:
        yield
    finally:
        tensor_files.safe_open = opens


def runs() -> dict[str, Recipe]:
    """Return the recipes of the three compressions that are counted: INT4, W8A8, one of two blocks pruned."""
    short = CalibrationOptions(tokens=512)
    return {
        "int4": made_recipe(calibration=short),
        "w8a8": made_recipe(calibration=short, quant=W8A8),
        "one block pruned": made_recipe(calibration=short, methods=(PruneOptions(blocks=1),)),
    }


def measured() -> dict[str, dict[str, dict[str, int]]]:
    """Return the counts of each run, first without a cache and then with what the first one left there."""
    from tiny_models import tiny_model

    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, options in runs().items():
        with TemporaryDirectory() as folder:
            tensor_cache.CACHE = Path(folder) / "cache"
            tiny_model("llama", bos_token_id=1).save_pretrained(Path(folder) / "model")
            found[name] = {
                cache: counts_of_one_compress(Path(folder) / "model", options) for cache in ("empty", "warm")
            }
    return found


if __name__ == "__main__":
    print(json.dumps(measured(), indent=1))

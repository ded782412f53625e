"""What a sparse matrix costs in a file and at run time: our entries of 3 bytes against ONNX' own sparse initializers.

The largest entries of every linear layer of SmolLM2 are kept (magnitude pruning, no low rank), and the model is
exported three times: dense with zeros, with ONNX sparse initializers (float32 values, int64 places), and as rk-export
stores entries (half-precision values, one-byte distances). All three hold the same matrices and are run.

    python samples/measure/measure_sparse_export.py        densities 0.5, 0.3 and 0.1

Writes docs/results/sparse_export.json and sparse_export.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, external_data_helper, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Results, Rows

from rk_export import CapOptions, Recipe, open_source, rewrite_model
from rk_export.graph.build import build_graph, save_graph
from rk_export.graph.modules.sparse import ENTRIES
from rk_export.passes.graph.nodes import PART_KEY

DENSITIES = (0.5, 0.3, 0.1)
STORAGES = ("dense", "sparse initializers", "3-byte entries")
TOKENS, REPEATS = 256, 5


def measure(model: Path, density: float, threads: int, work: Path) -> Rows:
    """Export one density three ways, and run all of them; return a row a storage."""
    magnitude = CapOptions(keep=density, selector="magnitude")
    rewritten = rewrite_model(model, Recipe((magnitude,)))
    ours = work / STORAGES[2]
    ours.mkdir()
    save_graph(build_graph(rewritten)[0], ours)
    folders = [work / name for name in STORAGES]
    spread(ours, folders[0], sparse=False)
    spread(ours, folders[1], sparse=True)
    loads, sessions = zip(*(load(folder, threads) for folder in folders), strict=True)
    times, logits = prefill(sessions, open_source(model).config.vocab_size)
    return {
        f"{folder.name}@{density}": {
            "density": density,
            "storage": folder.name,
            "megabytes": sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
            "load_seconds": seconds,
            "prefill_seconds": statistics.median(taken),
            "difference": float(np.abs(found - logits[0]).max()),
        }
        for folder, seconds, taken, found in zip(folders, loads, times, logits, strict=True)
    }


def spread(exported: Path, folder: Path, *, sparse: bool) -> None:
    """Write a copy of a graph whose entries are dense initializers, or ONNX' sparse ones."""
    folder.mkdir()
    model = onnx.load(exported / "model.onnx")
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    stored = {item.name: item for item in graph.initializer}
    products = [
        node
        for node in graph.node
        if any(item.key == PART_KEY and item.value.startswith(ENTRIES) for item in node.metadata_props)
    ]
    gone: set[str] = set()
    replaced = {product.input[1] for product in products}
    for product in products:
        name = product.input[1]
        matrix, nodes = dense_of(name, producers, stored)
        gone |= {node.output[0] for node in nodes}  # some products share a shape
        if sparse:
            places = np.flatnonzero(matrix)
            values = numpy_helper.from_array(matrix.ravel()[places], name)
            indices = numpy_helper.from_array(places.astype(np.int64), f"{name}.places")
            graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(matrix.shape)))
        else:
            graph.initializer.append(numpy_helper.from_array(matrix, name))
    # A constant may serve other nodes too.
    needed = {name for node in graph.node if node.output[0] not in gone for name in node.input} - replaced
    for node in [node for node in graph.node if node.output[0] in gone - needed]:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    for item in [item for item in graph.initializer if item.name not in used]:
        graph.initializer.remove(item)
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    if sparse:
        move_out(folder)


def dense_of(
    name: str, producers: dict[str, onnx.NodeProto], stored: dict[str, TensorProto]
) -> tuple[np.ndarray, list[onnx.NodeProto]]:
    """Return the matrix that the runtime would spread out for a product, and the nodes that do it."""
    gone: list[onnx.NodeProto] = []
    names = [name]
    while names:
        node = producers.get(names.pop())
        if node is not None and node not in gone:
            gone.append(node)
            names += node.input
    kept = [stored[item] for node in gone for item in node.input if item in stored]
    output = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
    part = helper.make_graph(list(reversed(gone)), "entries", [], [output], initializer=kept)
    model = helper.make_model(part, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    matrix: np.ndarray = session.run(None, {})[0]
    return matrix, gone


def move_out(folder: Path) -> None:
    """Put values and places of sparse initializers into the data file, as dense tensors are."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    with (folder / "model.onnx.data").open("ab") as data:
        for item in model.graph.sparse_initializer:
            for tensor in (item.values, item.indices):
                raw = numpy_helper.to_array(tensor).tobytes()
                external_data_helper.set_external_data(tensor, "model.onnx.data", data.tell(), len(raw))
                tensor.ClearField("raw_data")
                data.write(raw)
    (folder / "model.onnx").write_bytes(model.SerializeToString())


def load(folder: Path, threads: int) -> tuple[float, ort.InferenceSession]:
    """Return the median time until a session is ready, and one."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        session = ort.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), session


def prefill(
    sessions: Sequence[ort.InferenceSession], vocabulary: int
) -> tuple[list[list[float]], list[np.ndarray]]:
    """Return prefill times of all sessions, taken in turns, and their logits."""
    ids = np.random.default_rng(0).integers(10, vocabulary, (1, TOKENS))
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for item in sessions[0].get_inputs():
        if item.name.startswith("past_key_values."):
            feed[item.name] = np.zeros((1, item.shape[1], 0, item.shape[3]), np.float32)
    times: list[list[float]] = [[] for _ in sessions]
    logits: list[np.ndarray] = []
    for repeat in range(REPEATS + 1):
        for number, session in enumerate(sessions):
            start = time.perf_counter()
            found = session.run(["logits"], feed)[0]
            if repeat:
                times[number].append(time.perf_counter() - start)
            else:
                logits.append(found)
    return times, logits


def page(results: Results) -> str:
    """Return the figures as a page."""
    rows = results.rows
    lines = [
        [
            *(row["density"], row["storage"], f"{row['megabytes']:.1f}", f"{row['load_seconds']:.2f}"),
            *(f"{row['prefill_seconds']:.3f}", f"{row['difference']:.1e}"),
        ]
        for row in rows.values()
    ]
    head = [
        "# Sparse matrices in a file",
        "",
        "This page compares three ways to store sparse matrices in an ONNX file, by size and speed.",
        "",
        "Made by `python samples/measure/measure_sparse_export.py` with SmolLM2-135M-Instruct. The largest entries of "
        "every linear layer are kept, and the embedding stays dense. *Density* is the share of entries that is kept. "
        f"Times are medians on the CPU provider. The prefill of {TOKENS} tokens is taken in turns. Entries are "
        "rounded to half precision in all three, so the logits must agree.",
        "",
        harness.table(["density", "storage", "MB", "load, s", "prefill, s", "largest difference"], lines),
    ]
    return "\n".join([*head, "", "## Reading", "", *(f"- {line}" for line in reading(rows)), ""])


def reading(rows: Rows) -> Iterator[str]:
    """Yield what the numbers say."""
    for density in dict.fromkeys(row["density"] for row in rows.values()):
        dense, sparse, ours = (rows[f"{storage}@{density}"] for storage in STORAGES)
        yield (
            f"At density {density}, sparse initializers take {sparse['megabytes'] / dense['megabytes']:.2f} of the "
            f"dense file, and 3-byte entries {ours['megabytes'] / dense['megabytes']:.2f}. With 3-byte entries the "
            f"prefill takes {ours['prefill_seconds'] / dense['prefill_seconds']:.2f} of the dense time."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure all densities; write JSON and Markdown."""
    parser = harness.parser(__doc__, "model")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--threads", type=int, default=2)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Measure the densities that are missing: the three storages of one are compared with each other."""
    results = Results(args.out, "sparse_export", {"model": harness.model_name(args)})
    for density in args.densities:
        if any(row["density"] == density for row in results.rows.values()):
            continue
        with tempfile.TemporaryDirectory() as folder:
            results.rows |= measure(harness.model_of(args), density, args.threads, Path(folder))
        results.save()
    results.write_page(page(results))


if __name__ == "__main__":
    sys.exit(main())

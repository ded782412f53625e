"""What a sparse matrix costs in a file and at run time: our entries of 3 bytes against ONNX' own sparse initializers.

The largest entries of every linear layer of SmolLM2 are kept (magnitude pruning, no low rank), and the model is
exported three times: dense with zeros, with ONNX sparse initializers (float32 values, int64 places), and as rk-export
stores entries (half-precision values, one-byte distances). All three hold the same matrices and are run.

    python samples/measure_sparse_export.py              densities 0.5, 0.3 and 0.1; writes docs/results/sparse_export.*
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, external_data_helper, helper, numpy_helper
from rk_export.methods.plans import sparse_plan

from rk_export import CompressOptions
from rk_export.cli.main import quiet_libraries
from rk_export.evaluation.assets import smollm2
from rk_export.graph.build import build_graph, save_graph
from rk_export.graph.modules.sparse import ENTRIES
from rk_export.methods.cap.baselines import magnitude
from rk_export.options.calibration import CalibrationOptions
from rk_export.passes.graph.nodes import PART_KEY
from rk_export.rewrite.apply import rewrite
from rk_export.source.stored import StoredModel, open_source

DENSITIES = (0.5, 0.3, 0.1)
STORAGES = ("dense", "sparse initializers", "3-byte entries")
TOKENS, REPEATS = 256, 5


@dataclass(frozen=True)
class Row:
    """One export.

    Args:
        density: Share of the entries that are kept.
        storage: One of `STORAGES`.
        megabytes: Of model.onnx and its data.
        load_seconds: Until the session is ready, median.
        prefill_seconds: Of `TOKENS` tokens, median, interleaved with the other storages.
        difference: Largest difference of a logit from the dense storage's.
    """

    density: float
    storage: str
    megabytes: float
    load_seconds: float
    prefill_seconds: float
    difference: float


def measure(source: StoredModel, density: float, threads: int, work: Path) -> list[Row]:
    """Export one density three ways, and run all of them."""
    options = CompressOptions(
        groups=(),
        quant=None,
        embedding_quant=None,
        prepare=(),
        quantizer="rtn",
        calibration=CalibrationOptions("none"),
    )
    parts = magnitude(source, density)
    rewritten = rewrite(source, sparse_plan(source, options, parts), parts=parts)
    ours = work / STORAGES[2]
    ours.mkdir()
    save_graph(build_graph(rewritten)[0], ours)
    folders = [work / name for name in STORAGES]
    spread(ours, folders[0], sparse=False)
    spread(ours, folders[1], sparse=True)
    loads, sessions = zip(*(load(folder, threads) for folder in folders), strict=True)
    times, logits = run(sessions, source)
    return [
        Row(
            density,
            name,
            size / 1e6,
            seconds,
            statistics.median(taken),
            float(np.abs(found - logits[0]).max()),
        )
        for name, size, seconds, taken, found in zip(
            STORAGES, [bytes_of(folder) for folder in folders], loads, times, logits, strict=True
        )
    ]


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


def run(
    sessions: tuple[ort.InferenceSession, ...], source: StoredModel
) -> tuple[list[list[float]], list[np.ndarray]]:
    """Return prefill times of all sessions, taken in turns, and their logits."""
    ids = np.random.default_rng(0).integers(10, source.config.vocab_size, (1, TOKENS))
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


def bytes_of(folder: Path) -> int:
    """Return the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def markdown(rows: list[Row]) -> str:
    """Return the figures as a page."""
    lines = [
        f"| {row.density} | {row.storage} | {row.megabytes:.1f} | {row.load_seconds:.2f} | {row.prefill_seconds:.3f} "
        f"| {row.difference:.1e} |"
        for row in rows
    ]
    head = [
        "# Sparse matrices in a file",
        "",
        "`python samples/measure_sparse_export.py`: SmolLM2-135M-Instruct, the largest entries of every linear layer",
        f"kept, embedding dense. Times are medians on the CPU provider, prefill of {TOKENS} tokens taken in turns.",
        "Entries are rounded to half precision in all three, so the logits must agree.",
        "",
        "| density | storage | MB | load, s | prefill, s | largest difference |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return "\n".join([*head, *lines, "", "## Reading", "", *reading(rows), ""])


def reading(rows: list[Row]) -> list[str]:
    """Return what the numbers say, a line each."""
    lines = []
    for density in dict.fromkeys(row.density for row in rows):
        dense, sparse, ours = (row for row in rows if row.density == density)
        lines.append(
            f"- At density {density} sparse initializers take {sparse.megabytes / dense.megabytes:.2f} of the dense "
            f"file, 3-byte entries {ours.megabytes / dense.megabytes:.2f}; prefill takes "
            f"{ours.prefill_seconds / dense.prefill_seconds:.2f} of the dense time."
        )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure all densities; write JSON and Markdown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="HF folder, hub id or .gguf file (default SmolLM2-135M-Instruct)")
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args(arguments)
    quiet_libraries()
    source = open_source(args.model or smollm2())
    rows: list[Row] = []
    for density in args.densities:
        with tempfile.TemporaryDirectory() as folder:
            rows += measure(source, density, args.threads, Path(folder))
    args.out.mkdir(parents=True, exist_ok=True)
    data = json.dumps([asdict(row) for row in rows], indent=1) + "\n"
    (args.out / "sparse_export.json").write_text(data, encoding="utf-8")
    (args.out / "sparse_export.md").write_text(markdown(rows), encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()

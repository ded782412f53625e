"""What a matrix product costs on this machine, measured in ONNX Runtime: the prices of a speed-up."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from scipy.optimize import nnls

from rk_export.options.quantization import QuantSpec
from rk_export.passes.graph.token_scales import TokenScales
from rk_export.planning.stored_bytes import Format
from rk_export.progress import track

Phase = Literal["prefill", "decode"]
TOKENS: dict[Phase, int] = {"prefill": 512, "decode": 1}
# What timing a whole model takes: a prompt of one prefill, and tokens decoded after it.
DECODED = 64
TIMED_CONTEXT = TOKENS["prefill"] + DECODED + 1
_WARM_UP, _REPEATS = 2, 7
_MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class CostTable:
    """Milliseconds of matrix products: a fixed part, a part by the sizes and a part by their product.

    Args:
        phase: `prefill` is 512 tokens at once, `decode` is one.
        coefficients: Format -> milliseconds per product, per row and column, per entry.
        rest: Milliseconds of the model outside the products that a plan decides on.
    """

    phase: Phase
    coefficients: Mapping[Format, tuple[float, float, float]]
    rest: float = 0.0

    def milliseconds(self, rows: int, columns: int, spec: Format) -> float:
        """Return the milliseconds of one (rows, columns) product."""
        fixed, by_sizes, by_entries = self.coefficients[spec]
        return fixed + by_sizes * (rows + columns) + by_entries * rows * columns


def measure_costs(
    shapes: Iterable[tuple[int, int]], formats: Sequence[Format], phase: Phase, *, threads: int | None = None
) -> CostTable:
    """Measure products of the given shapes, their halves and their quarters, and fit a table to them.

    Args:
        shapes: (out, in) of the model's matrices.
        formats: Formats to measure.
        phase: How many tokens at once.
        threads: Threads of ONNX Runtime; None lets it decide.
    """
    whole = sorted(set(shapes))
    measured = sorted({(max(rows // cut, 16), columns) for rows, columns in whole for cut in (1, 2, 4)})
    sessions: dict[Key, ort.InferenceSession] = {
        (spec, shape): _product_session(*shape, spec, threads) for spec in formats for shape in measured
    }
    # A session without a product: what a call costs by itself stays out of the prices.
    sessions |= {(NO_PRODUCT, shape): _session([], {}, (shape[1], shape[1]), threads) for shape in measured}
    called = _interleaved(sessions, TOKENS[phase])
    times = {
        (spec, shape): max(called[spec, shape] - called[NO_PRODUCT, shape], 0.01 * called[spec, shape])
        for spec in formats
        for shape in measured
    }
    return CostTable(
        phase,
        {spec: _fit(measured, [times[spec, shape] for shape in measured]) for spec in formats},
    )


def product_rate(
    rows: int, columns: int, spec: Format, tokens: int, *, seconds: float, threads: int | None = None
) -> float:
    """Return the FLOPs a second of one product, from the fastest of the calls in a given time.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.
        spec: Its format.
        tokens: How many run together.
        seconds: How long to measure.
        threads: As in `measure_costs`.
    """
    session = _product_session(rows, columns, spec, threads)
    x = np.random.default_rng(0).standard_normal((1, tokens, columns), np.float32)
    session.run(None, {"x": x})
    fastest, end = math.inf, time.perf_counter() + seconds
    while fastest == math.inf or time.perf_counter() < end:
        begin = time.perf_counter()
        session.run(None, {"x": x})
        fastest = min(fastest, time.perf_counter() - begin)
    return 2.0 * rows * columns * tokens / fastest


def _fit(shapes: Sequence[tuple[int, int]], times: Sequence[float]) -> tuple[float, float, float]:
    """Return non-negative coefficients by least squares on relative errors."""
    table = np.array([[1.0, rows + columns, rows * columns] for rows, columns in shapes])
    weights = 1 / np.array(times)
    coefficients, _ = nnls(table * weights[:, None], np.ones(len(times)))
    return float(coefficients[0]), float(coefficients[1]), float(coefficients[2])


NO_PRODUCT = "no product"
Key = tuple[Format | str, tuple[int, int]]


def _interleaved(sessions: Mapping[Key, ort.InferenceSession], tokens: int) -> dict[Key, float]:
    """Return median milliseconds; rounds go over all sessions, so that a slow moment hits all alike."""
    samples: dict[Key, list[float]] = {key: [] for key in sessions}
    for round_number in track(range(_WARM_UP + _REPEATS), "timing products, rounds"):
        for key, session in sessions.items():
            x = np.random.default_rng(0).standard_normal((1, tokens, key[1][1]), np.float32)
            start = time.perf_counter()
            session.run(None, {"x": x})
            if round_number >= _WARM_UP:
                samples[key].append(1e3 * (time.perf_counter() - start))
    return {key: median(values) for key, values in samples.items()}


def _product_session(rows: int, columns: int, spec: Format, threads: int | None) -> ort.InferenceSession:
    """Return a session of one product x (1, tokens, columns) -> y (1, tokens, rows) as the exporter writes it."""
    generator = np.random.default_rng(rows * columns)
    if spec is None:
        node, tensors = _float_product(rows, columns, generator)
    elif spec.activations == 8:
        node, tensors = _int8_product(rows, columns, generator)
    else:
        node, tensors = _nbits_product(rows, columns, spec, generator)
    return _session([node], tensors, (rows, columns), threads)


def _session(
    nodes: list[NodeProto], tensors: dict[str, NDArray[Any]], shape: tuple[int, int], threads: int | None
) -> ort.InferenceSession:
    """Return a session that runs nodes from x to the value `product`, or none at all."""
    rows, columns = shape
    graph = helper.make_graph(
        [*nodes, helper.make_node("Identity", ["product" if nodes else "x"], ["y"])],
        "one_product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, "tokens", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, "tokens", rows])],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    TokenScales(sum(node.op_type == "DynamicQuantizeMatMul" for node in nodes))(model)
    options = ort.SessionOptions()
    options.log_severity_level = 3  # its own warnings about small graphs
    if threads is not None:
        options.intra_op_num_threads = threads
    proto = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])


Product = tuple[NodeProto, dict[str, NDArray[Any]]]


def _float_product(rows: int, columns: int, generator: np.random.Generator) -> Product:
    weight = generator.standard_normal((columns, rows), np.float32)
    return helper.make_node("MatMul", ["x", "w"], ["product"]), {"w": weight}


def _int8_product(rows: int, columns: int, generator: np.random.Generator) -> Product:
    codes = generator.integers(-127, 128, (columns, rows), np.int8)
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["product"], domain=_MICROSOFT)
    return node, {"w": codes, "s": np.full(rows, 0.01, np.float32)}


def _nbits_product(rows: int, columns: int, spec: QuantSpec, generator: np.random.Generator) -> Product:
    blocks = -(-columns // spec.block_size)
    packed = (rows, blocks, spec.block_size * spec.bits // 8)
    tensors: dict[str, NDArray[Any]] = {
        "w": generator.integers(0, 256, packed, np.uint8),
        "s": np.full((rows, blocks), 0.01, np.float32),
    }
    if not spec.symmetric:
        tensors["z"] = generator.integers(0, 256, (rows, -(-blocks * spec.bits // 8)), np.uint8)
    sizes = {"K": columns, "N": rows, "bits": spec.bits, "block_size": spec.block_size, "accuracy_level": 4}
    return helper.make_node("MatMulNBits", ["x", *tensors], ["product"], domain=_MICROSOFT, **sizes), tensors

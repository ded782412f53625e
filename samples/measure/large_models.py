"""What compressing models of 7 to 405 billion parameters takes, by arithmetic: FLOPs, bytes and hours of each stage.

    python samples/measure/large_models.py               # the page, from the rates that are in the results
    python samples/measure/large_models.py --measure     # measures the rates of this machine first: it must be idle
    python samples/measure/large_models.py --rates 95 241    # takes rates in GFLOPS (float32, bfloat16) as given

Nothing of that size is run here. The formulas stand in the functions below, one a stage.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure.harness import Results, Row, machine, parser, run, table

TOKENS = 8192  # of the calibration text, the default
ENTRIES = 1024  # of a side of the matrices that rates are measured with
REPEATS = 100
READINGS = 4  # comparison with transformers, forward, backward, rewrite
STORED, FLOAT = 2, 4  # bytes of a stored weight in bf16, of a float32
INT4 = 0.5625  # bytes of a weight in 4 bits with scales and zero points of blocks of 32

# Not measured: about half of what the data sheet of an H200 says, and a disk array.
GPU_RATES = {"fp32": 30e12, "bf16": 400e12, "disk": 5e9}
DISK = 1e9  # bytes a second of one machine's disk, not measured
GPUS = 8


@dataclass(frozen=True)
class Shape:
    """A decoder of the LLaMA family."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def key_width(self) -> int:
        return self.width // self.heads * self.kv_heads

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """(out, in) of each matrix of a layer."""
        d, kv, inner = self.width, self.key_width, self.inner
        return [(d, d), (kv, d), (kv, d), (d, d), (inner, d), (inner, d), (d, inner)]

    @property
    def inputs(self) -> list[int]:
        """Width of each distinct input of a layer's matrices: of q, k, v; of o; of gate, up; of down."""
        return [self.width, self.width, self.width, self.inner]

    @property
    def layer_weights(self) -> int:
        return sum(rows * columns for rows, columns in self.matrices)

    @property
    def weights(self) -> int:
        return self.layers * self.layer_weights + 2 * self.vocabulary * self.width


SHAPES = {
    "7 B": Shape(32, 4096, 11008, 32, 32, 32000),
    "70 B": Shape(80, 8192, 28672, 64, 8, 128256),
    "405 B": Shape(126, 16384, 53248, 128, 8, 128256),
}


def forward(shape: Shape) -> float:
    """Two FLOPs a weight and token."""
    return 2.0 * shape.layers * shape.layer_weights * TOKENS


def backward(shape: Shape) -> float:
    """The forward pass once more, from each layer's stored inputs, and the gradients of its inputs."""
    return 2 * forward(shape)


def moments(shape: Shape) -> float:
    """X^T X of every distinct input, n^2 T multiply-adds."""
    return 2.0 * shape.layers * sum(n * n for n in shape.inputs) * TOKENS


def gptq(shape: Shape) -> float:
    """Of each matrix (N, K): a Cholesky factor K^3/3, a first sweep N K^2, and one that refines 2 N K^2."""
    return float(shape.layers * sum(K**3 / 3 + 3 * N * K * K for N, K in shape.matrices))


# Stage -> its FLOPs, the type they run in, whether layers are finished side by side.
STAGES = {
    "forward": (forward, "bf16", False),
    "backward": (backward, "bf16", False),
    "moments": (moments, "fp32", False),
    "GPTQ": (gptq, "fp32", True),
}


def disk(shape: Shape) -> dict[str, float]:
    """Return the bytes that are read of the model, and that lie on disk at most."""
    return {
        "read": READINGS * STORED * shape.weights,
        "hidden states": FLOAT * (shape.layers + 1) * TOKENS * shape.width,
        "moments": FLOAT * shape.layers * sum(n * n for n in shape.inputs),
        "finished layers": INT4 * shape.layers * shape.layer_weights,
        "bundle": INT4 * shape.weights,
    }


def rate(dtype: torch.dtype) -> float:
    """Return the FLOPs a second of a product of square matrices here, the fastest of many: other work disturbs some."""
    A = torch.randn(ENTRIES, ENTRIES).to(dtype)
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        A @ A
        times.append(time.perf_counter() - begin)
    return 2 * ENTRIES**3 / min(times)


def measured_rates() -> Row:
    """Return the rates of this machine."""
    rates = {"fp32": rate(torch.float32), "bf16": rate(torch.bfloat16)}
    how = f"measured on products of {ENTRIES} x {ENTRIES} matrices, the fastest of {REPEATS}"
    return {**rates, "machine": machine(), "how": how}


def given_rates(fp32: float, bf16: float) -> Row:
    """Return rates that somebody measured in another way, in GFLOPS."""
    how = "given on the command line, not measured by this script"
    return {"fp32": 1e9 * fp32, "bf16": 1e9 * bf16, "machine": machine(), "how": how}


def hours(shape: Shape, rates: Row, disk_rate: float, side_by_side: int = 1) -> dict[str, float]:
    """Return the hours of each stage; only layers that are independent are finished side by side."""
    spent = {
        name: flops(shape) / rates[dtype] / (side_by_side if alone else 1) / 3600
        for name, (flops, dtype, alone) in STAGES.items()
    }
    return {**spent, "reading": disk(shape)["read"] / disk_rate / 3600}


def page(rates: Row) -> str:
    """Return the page."""
    flops = table(
        ["model", *STAGES],
        (
            [name, *(f"{count(shape):.2g}" for count, _, _ in STAGES.values())]
            for name, shape in SHAPES.items()
        ),
        " rrrr",
    )
    size = table(
        ["model", "read", "hidden states", "moments", "finished layers", "bundle"],
        (
            [name, *(f"{value / 1e9:,.0f}" for value in disk(shape).values())]
            for name, shape in SHAPES.items()
        ),
        " rrrrr",
    )
    return f"""# Large models: the arithmetic

How long would a model take that nobody compressed here? This page computes it. Nothing of that size was
run. `python samples/measure/large_models.py --measure` writes the page, and its functions hold the formulas.

The calibration text has {TOKENS:,} tokens, and the recipe is plain INT4 with GPTQ.

## Work

FLOPs of each stage:

{flops}

GPTQ grows with the square of a matrix' columns times its rows. So it is the largest part, and the one that workers
share.

## Disk

Gigabytes that a run reads of the model in {READINGS} readings, and that lie on disk at most:

{size}

The moments are dropped with the work folder when the run ends. Statistics above 2 GB never go to the cache.

## Hours on one machine

{rates["machine"]}: {rates["fp32"] / 1e9:.0f} GFLOPS in float32 and {rates["bf16"] / 1e9:.0f} in bfloat16. They were
{rates["how"]}. The disk is assumed to read
{DISK / 1e9:.0f} GB a second.

{_hours_table(rates, DISK)}

## Hours on {GPUS} GPUs

Assumed, not measured: {GPU_RATES["fp32"] / 1e12:.0f} TFLOPS in float32 and {GPU_RATES["bf16"] / 1e12:.0f} in bfloat16 a
GPU, and storage that reads {GPU_RATES["disk"] / 1e9:.0f} GB a second. Forward, backward and moments run
on one GPU. GPTQ runs on {GPUS} with `--workers {GPUS}`.

{_hours_table(GPU_RATES, GPU_RATES["disk"], GPUS)}

These are floors. Writing the calibration text, the export and parity come on top.
"""


def _hours_table(rates: Row, disk_rate: float, side_by_side: int = 1) -> str:
    lines = []
    for name, shape in SHAPES.items():
        spent = hours(shape, rates, disk_rate, side_by_side)
        lines.append([name, *(f"{value:.2g}" for value in spent.values()), f"{sum(spent.values()):.2g}"])
    return table(["model", *STAGES, "reading", "sum"], lines, " rrrrrr")


def main() -> int:
    """Write the page."""
    arguments = parser(__doc__)
    arguments.add_argument("--measure", action="store_true", help="measure the rates of this machine")
    arguments.add_argument("--rates", type=float, nargs=2, metavar="GFLOPS", help="of float32 and bfloat16")
    return run(write, arguments.parse_args())


def write(args: argparse.Namespace) -> None:
    """Measure where asked to, compute and write."""
    results = Results(args.out, "large_models")
    if args.measure or args.rates:
        results.rows.pop("rates", None)
    measure = functools.partial(given_rates, *args.rates) if args.rates else measured_rates
    results.measure([("rates", measure)])
    results.write_page(page(results.rows["rates"]))


if __name__ == "__main__":
    sys.exit(main())

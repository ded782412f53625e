"""The least time that a stage of a compression can take: products over the rate of this machine, bytes over its disk's.

A multiplication and an addition are two FLOPs. Only work that no implementation of the default recipe can leave out is
counted, so a floor is a bound from below and no prediction. Bytes are those of model files and outputs; what the page
cache holds comes faster.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from measure import shapes
from safetensors import safe_open
from scipy.linalg import blas
from transformers import PretrainedConfig

PROBE = 256  # tokens of the probe: eight prompts of 32
GREEDY = 512  # tokens that verification generates
BACK = 4096  # the most tokens of the text that run back
SECONDS = 0.5  # that a rate is measured for
DISK = 1 << 28  # bytes that are written and read
PROCESS, LAYERS = 1_500_000_000, 4  # the bound: bytes of the process, copies of the largest layer in float32
READ_TOGETHER = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "gate_proj": "up", "up_proj": "up"}


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Args:
        fp32: FLOPs of products of float32 matrices.
        bf16: FLOPs of products of bfloat16 matrices.
        ssyrk: FLOPs of symmetric rank-k updates in float32.
        write: Bytes that reach the disk.
        read: Bytes that come from the disk.
    """

    fp32: float
    bf16: float
    ssyrk: float
    write: float
    read: float

    @property
    def products(self) -> float:
        """FLOPs of products in the faster type."""
        return max(self.fp32, self.bf16)


@dataclass(frozen=True)
class Counts:
    """Sizes of a model that work and memory follow from.

    Args:
        layers: How many there are.
        active: Parameters of one layer's matrices that a token passes; of a mixture, those of the chosen experts.
        matrices: Shapes (out, in) of one layer's matrices.
        reads: Widths of what they read, once for those that read the same.
        outputs: Widths of what they put out.
        table: Rows times width of the embedding.
        head: The same of the output projection, whether it is stored or tied.
        width: Of the hidden states.
        stored: Bytes of the model's files.
        table_bytes: Bytes of the embedding as it is stored.
        layer: Parameters of one layer.
    """

    layers: int
    active: int
    matrices: tuple[tuple[int, int], ...]
    reads: tuple[int, ...]
    outputs: tuple[int, ...]
    table: int
    head: int
    width: int
    stored: int
    table_bytes: int
    layer: int


@dataclass(frozen=True)
class Work:
    """What a stage cannot leave out; FLOPs by type, and bytes."""

    products: float = 0.0
    fp32: float = 0.0
    ssyrk: float = 0.0
    written: float = 0.0
    read: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Return its time on a machine that does one thing after the other."""
        flops = self.products / rates.products + self.fp32 / rates.fp32 + self.ssyrk / rates.ssyrk
        return flops + self.written / rates.write + self.read / rates.read


def counts_of(config: PretrainedConfig, folder: Path) -> Counts:
    """Return the sizes of a Llama, a Qwen2 or a mixture in a folder with safetensors files."""
    named = shapes.layer_shapes(config)
    matrices = {name: shape for name, shape in named.items() if len(shape) == 2}
    reads = {_reader(name): shape[1] for name, shape in matrices.items()}
    experts = getattr(config, "num_experts", 1)
    chosen = getattr(config, "num_experts_per_tok", 1)
    active = sum(
        math.prod(shape) * (chosen / experts if ".experts." in name else 1)
        for name, shape in matrices.items()
    )
    return Counts(
        config.num_hidden_layers,
        round(active),
        tuple(matrices.values()),
        tuple(reads.values()),
        tuple(shape[0] for shape in matrices.values()),
        config.vocab_size * config.hidden_size,
        config.vocab_size * config.hidden_size,
        config.hidden_size,
        sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        table_bytes(folder),
        sum(map(math.prod, named.values())),
    )


def _reader(name: str) -> str:
    """Return what matrices that read the same have in common."""
    before, _, kind = name.removesuffix(".weight").rpartition(".")
    return f"{before}.{READ_TOGETHER.get(kind, kind)}"


def table_bytes(folder: Path) -> int:
    """Return the bytes of the embedding as it is stored."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                if name.endswith("embed_tokens.weight"):
                    found = file.get_slice(name)
                    return math.prod(found.get_shape()) * {"F32": 4}.get(found.get_dtype(), 2)
    raise ValueError(f"no embedding in {folder}")


def bound(counts: Counts) -> int:
    """Return the bytes of anonymous memory that a compression may take: it does not grow with the depth."""
    return PROCESS + counts.table_bytes + LAYERS * 4 * counts.layer + moments_bytes(counts)


def moments_bytes(counts: Counts) -> int:
    """Return the bytes of one layer's moments in float32: of what matrices read, and of their outputs' gradients."""
    return 4 * sum(width**2 for width in (*counts.reads, *counts.outputs))


def pass_flops(counts: Counts, tokens: int) -> float:
    """Return the FLOPs of tokens through the layers, once: two a parameter."""
    return 2.0 * tokens * counts.layers * counts.active


def head_flops(counts: Counts, tokens: int) -> float:
    """Return the FLOPs of the logits of tokens."""
    return 2.0 * tokens * counts.head


def moment_flops(counts: Counts, tokens: int) -> float:
    """Return the FLOPs of the second moments of what the matrices read: n (n + 1) a token, one triangle."""
    return float(counts.layers * tokens * sum(width * (width + 1) for width in counts.reads))


def cholesky_flops(counts: Counts) -> float:
    """Return the FLOPs of one Cholesky factor of each moment: a third of n³."""
    return counts.layers * sum(width**3 for width in counts.reads) / 3


def gptq_flops(counts: Counts) -> float:
    """Return the FLOPs of GPTQ: the error of each column goes to all later ones, rows times columns² together."""
    return float(counts.layers * sum(rows * columns**2 for rows, columns in counts.matrices))


def calibrate(counts: Counts, tokens: int) -> Work:
    """Return what text and statistics take.

    The model writes the text, all of it runs through the model again, and the first tokens run back: the forward pass
    of a layer is made again, and the gradient of its input costs as much. The files are read for each of the three
    ways. Layer inputs go to the disk and come back, and the moments stay there.
    """
    back = min(tokens, BACK)
    products = 2 * pass_flops(counts, tokens) + 2 * pass_flops(counts, back)
    products += head_flops(counts, tokens) + 2 * head_flops(counts, back)
    states = 4.0 * counts.layers * back * counts.width
    moments = 4.0 * counts.layers * sum(width**2 for width in counts.reads)
    read = 3.0 * counts.stored + states
    return Work(products, ssyrk=moment_flops(counts, tokens), written=states + moments, read=read)


def stages(counts: Counts, tokens: int, output: int) -> dict[str, Work]:
    """Return the work of each stage of a compression with the default recipe; other stages have no floor worth a name.

    Args:
        counts: Of the model.
        tokens: Of the calibration text.
        output: Bytes of the bundle's model files.
    """
    probe = pass_flops(counts, PROBE) + head_flops(counts, PROBE)
    moments = 4.0 * counts.layers * sum(width**2 for width in counts.reads)
    verified = pass_flops(counts, PROBE + GREEDY) + head_flops(counts, PROBE + GREEDY)
    return {
        # Our model and that of transformers run on the probe in float32.
        "check": Work(fp32=2 * probe, read=counts.stored),
        "calibrate": calibrate(counts, tokens),
        # Conditional variances of what each matrix reads, from a factor of its moment.
        "plan": Work(fp32=cholesky_flops(counts), read=moments),
        # A factor of each inverse, GPTQ, and the probe through the layers before and after.
        "rewrite": Work(
            fp32=cholesky_flops(counts) + gptq_flops(counts) + 2 * probe,
            written=output,
            read=counts.stored + moments,
        ),
        "export": Work(written=output, read=output),
        # The probe and the generated tokens, in PyTorch and in ONNX Runtime.
        "verify": Work(products=2 * verified, read=output),
    }


@functools.cache
def rates(folder: Path) -> Rates:
    """Measure the machine and the disk of a folder."""
    with torch.inference_mode():
        return Rates(
            gemm(torch.float32), gemm(torch.bfloat16), symmetric(), *disk(folder / f".rate-{os.getpid()}")
        )


def rate(amount: float, call: Callable[[], object]) -> float:
    """Return an amount over the time of the fastest call."""
    call()
    fastest, end = math.inf, time.perf_counter() + SECONDS
    while fastest == math.inf or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        fastest = min(fastest, time.perf_counter() - begin)
    return amount / fastest


def gemm(dtype: torch.dtype, size: int = 1024) -> float:
    """Return the FLOPs a second of square products."""
    left, right = (torch.randn(size, size).to(dtype) for _ in range(2))
    return rate(2.0 * size**3, lambda: left @ right)


def symmetric(size: int = 1024) -> float:
    """Return the FLOPs a second of a symmetric rank-k update, as moments are summed."""
    rows = np.random.default_rng(0).standard_normal((size, size), np.float32).T
    total = np.zeros((size, size), np.float32, order="F")
    amount = float(size * size * (size + 1))
    return rate(amount, lambda: blas.ssyrk(1.0, rows, beta=1.0, c=total, lower=1, overwrite_c=1))


def disk(path: Path) -> tuple[float, float]:
    """Return the bytes a second that a new file is written with, and read with once the system forgot its pages."""
    block = os.urandom(1 << 22)
    try:
        begin = time.perf_counter()
        with path.open("wb") as file:
            for _ in itertools.repeat(None, DISK // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            written = DISK / (time.perf_counter() - begin)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        with path.open("rb", buffering=0) as file:
            while file.read(len(block)):
                pass
        return written, DISK / (time.perf_counter() - begin)
    finally:
        path.unlink(missing_ok=True)


def row(rates: Rates) -> Mapping[str, float]:
    """Return rates as a row keeps them."""
    return asdict(rates)

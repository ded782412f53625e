"""How fast the joint factorization is, and how exact, against ``torch.linalg.svd`` of the same stacked matrix.

Two matrices with the shapes of LLaMA-7B's groups: query and key stacked (8192, 4096), gate and up stacked
(22016, 4096); random, with singular values that fall as those of trained weights do. Both methods run in turn,
medians are compared.

    python samples/measure/bench_factorization.py --out DIR                    on the CPU
    python samples/measure/bench_factorization.py --out DIR --device cuda      on a GPU
    python samples/measure/bench_factorization.py --out DIR --scale 8          smaller shapes, to try it in seconds

Writes factorization.json and factorization.md, into docs/results unless ``--out`` says otherwise.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

from measure import harness
from measure.harness import Results, Row

from rk_export.passes.numerics.joint_svd import joint_factors
from rk_export.passes.numerics.ranks import rank_of_ratio

SHAPES = {"q, k": (8192, 4096), "gate, up": (22016, 4096)}
DECAY = 0.35  # the j-th singular value falls as (1 + 100 j / n)^-DECAY: a factor of 5 from first to last
ROWS_AT_ONCE = 4096  # of the residual, which is summed in float64

Approximation = tuple[Tensor, Tensor]  # up (out, k), down (k, in)


def stacked_matrix(rows: int, columns: int, device: torch.device, seed: int = 0) -> Tensor:
    """Return a random float32 matrix (rows, columns) with a falling spectrum in a random basis."""
    generator = torch.Generator(device).manual_seed(seed)
    position = torch.arange(columns, device=device) / columns
    scales = (1 + 100 * position) ** -DECAY
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator, device=device)).Q
    W: Tensor = (torch.randn(rows, columns, generator=generator, device=device) * scales) @ basis.T
    return W


def joint(W: Tensor, rank: int) -> Approximation:
    """Return the package's factors."""
    factors = joint_factors(W, rank)
    return factors.up, factors.down


def reduced_svd(W: Tensor, rank: int) -> Approximation:
    """Return the factors of the thin SVD."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def timed(
    factorize: Callable[[Tensor, int], Approximation], W: Tensor, rank: int
) -> tuple[float, Approximation]:
    """Return seconds, device work included, and the result."""
    synchronize(W.device)
    start = time.perf_counter()
    result = factorize(W, rank)
    synchronize(W.device)
    return time.perf_counter() - start, result


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def relative_error(W: Tensor, approximation: Approximation) -> float:
    """Return ||W - B A|| / ||W||, products and sums in float64."""
    up, down = approximation[0], approximation[1].double()
    squared = norm = 0.0
    for start in range(0, W.shape[0], ROWS_AT_ONCE):
        rows = W[start : start + ROWS_AT_ONCE].double()
        squared += float((rows - up[start : start + ROWS_AT_ONCE].double() @ down).square().sum())
        norm += float(rows.square().sum())
    return float((squared / norm) ** 0.5)


def full_svd(W: Tensor, expected_seconds: float, budget: float) -> float | str:
    """Return seconds of one SVD with PyTorch's default ``full_matrices=True``, or why it was skipped."""
    if expected_seconds > budget:
        return f"skipped: about {expected_seconds:.0f} s expected, --full-budget is {budget:.0f} s"
    try:
        seconds, _ = timed(lambda matrix, _: torch.linalg.svd(matrix)[::2], W, 0)
    except torch.OutOfMemoryError:
        return "skipped: out of memory"
    return seconds


def measure(shape: tuple[int, int], args: argparse.Namespace) -> Row:
    """Run both methods in turn on one matrix; all seconds are kept, errors are relative Frobenius norms."""
    W = stacked_matrix(*shape, torch.device(args.device))
    rank = rank_of_ratio(args.keep, shape[1], shape[0])
    times: dict[str, list[float]] = {"joint": [], "svd": []}
    errors: dict[str, float] = {}
    for _ in range(args.repeats):
        for name, factorize in (("joint", joint), ("svd", reduced_svd)):
            seconds, result = timed(factorize, W, rank)
            times[name].append(seconds)
            if name not in errors:
                errors[name] = relative_error(W, result)
            del result
    return {
        "shape": list(shape),
        "rank": rank,
        "joint_seconds": times["joint"],
        "svd_seconds": times["svd"],
        "full_svd": full_svd(W, median(times["svd"]) * shape[0] / shape[1], args.full_budget),
        "joint_error": errors["joint"],
        "svd_error": errors["svd"],
        "speedup": median(times["svd"]) / median(times["joint"]),
        "error_difference": errors["joint"] / errors["svd"] - 1,
    }


def page(results: Results) -> str:
    """Return the results as a Markdown page."""
    where = results.facts["machine"]
    return "\n".join(
        [
            "# Joint factorization against torch.linalg.svd",
            "",
            "Our joint factorization gives the truncation that the SVD gives, in less time.",
            "",
            f"Made by `python samples/measure/bench_factorization.py` on {where['device']}, with {where['threads']} "
            f"threads and PyTorch {where['torch']}. Times are medians of runs in turn. *Error* is the relative error "
            "of the approximation. *Relative difference* is the distance of the joint factorization's error from the "
            "SVD's error. The default SVD also builds the square U.",
            "",
            harness.table(
                [
                    *(
                        "matrices",
                        "shape",
                        "rank",
                        "joint, s",
                        "thin SVD, s",
                        "ratio",
                        "default SVD, s",
                        "error",
                    ),
                    "relative difference",
                ],
                [(name, *cells(row)) for name, row in results.rows.items()],
                "  rrrrrrr",
            ),
            "",
        ]
    )


def cells(row: Row) -> list[object]:
    """Return one line of the table."""
    medians = (f"{median(row[name]):.3f}" for name in ("joint_seconds", "svd_seconds"))
    default = row["full_svd"] if isinstance(row["full_svd"], str) else f"{row['full_svd']:.2f}"
    shape = "{} × {}".format(*row["shape"])
    errors = f"{row['joint_error']:.6f}", f"{row['error_difference']:.1e}"
    return [shape, row["rank"], *medians, f"{row['speedup']:.1f}", default, *errors]


def machine(device: torch.device) -> dict[str, str | int]:
    """Return what the times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def processor() -> str:
    """Return the processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the shapes that are missing."""
    parser = harness.parser(__doc__, "rows")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default %(default)s)")
    parser.add_argument(
        "--scale", type=int, default=1, help="divide the shapes by this (default %(default)s)"
    )
    parser.add_argument("--keep", type=float, default=0.9, help="kept ratio, which sets the rank")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each method (default %(default)s)")
    full = "seconds that the default SVD, which also builds the square U, may take (default %(default)s)"
    parser.add_argument("--full-budget", type=float, default=300, help=full)
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Warm up, measure, report."""
    device = torch.device(args.device)
    for warm_up in (joint, reduced_svd):
        warm_up(stacked_matrix(256, 128, device), 16)
    results = Results(args.out, "factorization", {"machine": machine(device), "keep": args.keep})
    shapes = {name: (rows // args.scale, columns // args.scale) for name, (rows, columns) in SHAPES.items()}
    results.measure([(name, partial(measure, shape, args)) for name, shape in shapes.items()], args.rows)
    results.write_page(page(results))


if __name__ == "__main__":
    sys.exit(main())

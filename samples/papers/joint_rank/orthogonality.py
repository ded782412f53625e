"""The mapping space of the shared factor: truncated, rounded, refitted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from matplotlib.figure import Figure
from measure.harness import COLORS, Measure, Row, Rows, legend, new_figure, short, styled, table
from papers.joint_rank.study import Part, Study, log_scale
from papers.joint_rank.subspaces import largest_defect, principal_angles
from torch import Tensor

from rk_export import QuantSpec
from rk_export.passes.numerics.identity_form import refit_up
from rk_export.passes.numerics.joint_svd import joint_factors, orthogonality_defect
from rk_export.passes.numerics.metric import Metric
from rk_export.passes.numerics.quantize import quantize_rtn
from rk_export.passes.numerics.ranks import rank_of_ratio

GROUPS_SHOWN = ("qk", "gate_up")
ORTHOGONAL_KEEP = 0.8
ROUNDED = {"int8": QuantSpec(8, 32), "int4": QuantSpec(4, 32)}


def orthogonality_rows(study: Study) -> Iterator[tuple[str, Measure]]:
    """Yield five layers of each group."""
    count = study.source.layer_count
    for group in GROUPS_SHOWN:
        for layer in sorted({round(x) for x in np.linspace(0, count - 1, 5)}):
            yield f"{group}/{layer}", partial(_orthogonality_row, study, group, layer)


@torch.no_grad()
def _orthogonality_row(study: Study, group: str, layer: int) -> Row:
    W = torch.cat([linear.weight for linear in study.linears(study.model, group)[layer]]).double()
    factors = joint_factors(W, rank_of_ratio(ORTHOGONAL_KEEP, W.shape[1], W.shape[0]))
    A, B, k = factors.down, factors.up, factors.rank
    place = layer, study.paths(group)[0]
    known = study.statistics("self")
    if known is None:
        raise RuntimeError("the metric self gathers statistics")
    calibrated, real = Metric.of(known.second[place]), study.real_inputs[place].double()

    def errors(product: Tensor) -> Row:
        E, target = product - B @ A, B @ A
        outputs = float(((E @ real) * E).sum()) / float(((target @ real) * target).sum())
        return {"weights": float(E.norm() / target.norm()), "outputs": math.sqrt(max(0.0, outputs))}

    def space(rows: Tensor) -> Row:
        angles = principal_angles(A, rows)
        return {
            "largest_angle": math.degrees(float(angles[-1])),
            "overlap": float(angles.cos().square().mean()),
        }

    def rounded(matrix: Tensor, spec: QuantSpec) -> Tensor:
        return quantize_rtn(matrix.float(), spec).dequantize().double()

    row: Row = {"rank": k, "gap": float(factors.singular_values[k - 1] / factors.singular_values[k])}
    truncated = _right_rows(B @ A, k)
    row["truncated"] = {"defect": orthogonality_defect(A), "max": largest_defect(A), **space(truncated)}
    for name, spec in ROUNDED.items():
        A_q = rounded(A, spec)
        plain, weighted = (B @ refit_up(A, A_q, metric) for metric in (None, calibrated))
        row[name] = {
            "defect": orthogonality_defect(A_q),
            "max": largest_defect(A_q),
            **space(A_q),
            "dense": space(_right_rows(rounded(W, spec), k)),
            "before": errors(B @ A_q),
            "refit": errors(plain @ A_q),
            "refit under self": errors(weighted @ A_q),
            "both rounded": errors(rounded(B, spec) @ A_q),
            "both rounded, refit": errors(rounded(plain, spec) @ A_q),
            "both rounded, refit under self": errors(rounded(weighted, spec) @ A_q),
        }
    return row


def _right_rows(W: Tensor, rank: int) -> Tensor:
    """Return the leading right singular vectors of W (out, in) as rows (rank, in)."""
    rows: Tensor = torch.linalg.svd(W, full_matrices=False).Vh[:rank]
    return rows


def orthogonality_tables(rows: Rows) -> Iterator[str]:
    """Yield the geometry, then the errors of the product."""
    if not rows:
        return
    lines = []
    for key, row in rows.items():
        for stage in ("truncated", *ROUNDED):
            found = row[stage]
            dense = found.get("dense")
            geometry = f"{found['largest_angle']:.3g}°", f"{found['overlap']:.6f}"
            rounded = f"{dense['largest_angle']:.3g}°, {dense['overlap']:.4f}" if dense else ""
            defects = f"{found['defect']:.1e}", f"{found['max']:.1e}"
            lines.append([key, row["rank"], stage, *defects, *geometry, rounded])
    yield (
        "*Defect* and *largest* are ‖AAᵀ−I‖ of the shared factor A, as Frobenius norm and as largest entry. *Angle* "
        "is the largest principal angle between the span of its rows and the leading right singular subspace of the "
        "dense matrix. *Overlap* is the mean squared cosine. The last column gives both for the leading subspace of "
        "the *dense* matrix after rounding."
    )
    yield table(
        ["group/layer", "rank", "A is", "defect", "largest", "angle", "overlap", "dense rounded"], lines
    )
    stages = ["before", "refit", "refit under self", "both rounded", "both rounded, refit"]
    stages.append("both rounded, refit under self")
    yield "Error of the product against the float pair, in the weights / in outputs on real inputs:"
    yield table(
        ["group/layer", "bits", *stages],
        [
            [key, name, *(f"{row[name][s]['weights']:.4f} / {row[name][s]['outputs']:.4f}" for s in stages)]
            for key, row in rows.items()
            for name in ROUNDED
        ],
    )


def orthogonality_reading(rows: Rows) -> Iterator[str]:
    """Say what truncation, rounding and the refit each do to the mapping space."""
    if not rows:
        return
    values = list(rows.values())
    worst = max(row["truncated"]["largest_angle"] for row in values)
    yield (
        f"Truncation keeps the leading subspace: the largest angle is {worst:.1e} degrees. The rows are orthonormal "
        f"up to {max(row['truncated']['defect'] for row in values):.0e}."
    )
    for name in ROUNDED:
        found = [row[name] for row in values]
        kept = [1 - x["overlap"] for x in found]
        dense = [1 - x["dense"]["overlap"] for x in found]
        yield (
            f"{name}: ‖AAᵀ−I‖ is {_range(x['defect'] for x in found)}, its largest entry "
            f"{_range(x['max'] for x in found)}. Angles reach {_range(x['largest_angle'] for x in found)} "
            f"degrees, and {_range(kept)} of the subspace turns away. Rounding the dense matrix instead turns "
            f"{_range(dense)} of its leading subspace. Its singular values at the cut are nearly equal (ratios of "
            f"neighbours {_range(row['gap'] for row in values)}), so the leading subspace is hardly defined there."
        )
        for what in ("weights", "outputs"):
            ratio = [x["refit under self"][what] / x["before"][what] for x in found]
            plain = [x["refit"][what] / x["before"][what] for x in found]
            both = [x["both rounded, refit under self"][what] / x["both rounded"][what] for x in found]
            yield (
                f"{name}, error in the {what} after the refit over that before: {_range(plain)} (least squares), "
                f"{_range(ratio)} (under self). With the second factor rounded too: {_range(both)} (under self)."
            )
    yield (
        "The refit changes B and not A. So the angles and ‖AAᵀ−I‖ above stay what they are, and every refitted "
        "product still reads the span of the rounded rows. The refit restores the part of the product that this span "
        "can express. A change of gauge would make the rows orthonormal again. But the changed A is no longer on the "
        "grid, and the span is the same."
    )


def _range(values: Iterable[float]) -> str:
    found = list(values)
    low, high = short(min(found)), short(max(found))
    return low if low == high else f"{low} to {high}"


@styled
def orthogonality_figure(rows: Rows) -> Figure | None:
    """Draw the part of the subspace that turns away and the product's errors, INT4."""
    if not rows:
        return None
    figure, axes = new_figure(1, 2, 3.2)
    names, at = list(rows), np.arange(len(rows))
    for index, (bits, color) in enumerate(zip(ROUNDED, COLORS, strict=False)):
        axes[0, 0].bar(
            at + 0.35 * index, [1 - rows[n][bits]["overlap"] for n in names], 0.35, color=color, label=bits
        )
    log_scale(axes[0, 0])
    axes[0, 0].set(title="part of the mapping space that turns away")
    stages = ("before", "refit", "refit under self")
    for index, (stage, color) in enumerate(zip(stages, COLORS, strict=False)):
        errors = [rows[name]["int4"][stage]["outputs"] for name in names]
        axes[0, 1].bar(at + 0.27 * index, errors, 0.27, color=color, label=stage)
    axes[0, 1].set(title="INT4: relative error of the outputs")
    for panel in axes.flat:
        panel.set_xticks(at + 0.27, names, rotation=60, fontsize=7)
        legend(panel)
    return figure


PART = Part(
    "orthogonality",
    "Orthogonality and the mapping space",
    "What does rounding do to the shared factor A, and what does a refit of the second factor B restore? The factors "
    f"are joint, in the orthogonal gauge (the rows of A are orthonormal), at kept ratio {ORTHOGONAL_KEEP} and metric "
    "none. Rounding is to nearest, in symmetric blocks of 32. The refit is the least-squares B for the rounded A, in "
    "floats. It is plain, or under the second moment of the model's own text. The packaged model's weights lie on a "
    "4-bit grid already. This may flatter the rounding of dense matrices, but not that of factors.",
    orthogonality_rows,
    orthogonality_tables,
    orthogonality_reading,
    orthogonality_figure,
)

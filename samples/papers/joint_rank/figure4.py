"""A task over the kept ratio of q and k (figure 4 of 2402.16319)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from assets import task_file
from matplotlib.figure import Figure
from measure.harness import COLORS, Measure, Row, Rows, legend, new_figure, short, styled, table
from papers.joint_rank.study import CPU, METRICS, MetricName, Part, Study, listed, paired

from rk_export import load_tasks, torch_logits
from rk_export.device import matmul_dtype, matmuls_in
from rk_export.evaluation.log_likelihood import PairEncoder
from rk_export.evaluation.multiple_choice import score_task
from rk_export.runtime.text import TextCodec

QK_RATIOS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.6, 0.45, 0.3)
RATIOS: dict[MetricName, tuple[float, ...]] = {"none": QK_RATIOS, "self": (0.95, 0.8, 0.6, 0.3)}
SCORES = {"acc": "right", "acc_norm": "right_norm"}


def figure4_rows(study: Study) -> Iterator[tuple[str, Measure]]:
    """Yield the dense model twice, in bfloat16 and in float32, then every metric and kept ratio."""
    yield "dense", partial(_task_row, study, matmul_dtype(CPU))
    yield "dense, float32", partial(_task_row, study, torch.float32)
    for metric in METRICS:
        for keep in RATIOS[metric]:
            yield f"{metric}/{keep}", partial(_truncated_task_row, study, metric, keep)


def _truncated_task_row(study: Study, metric: MetricName, keep: float) -> Row:
    ladder = study.ladder(("qk",), metric)
    ranks = ladder.ranks_of_ratio(keep)
    with ladder.cut(ranks):
        return {"kept": ladder.kept(ranks), "rank": ranks[0], **_task_row(study, matmul_dtype(CPU))}


def _task_row(study: Study, dtype: torch.dtype) -> Row:
    name = study.protocol.task
    file = name if name.endswith(".jsonl") else task_file(name)
    (task,) = load_tasks([file], study.protocol.items)
    encoder = PairEncoder(TextCodec(study.source.folder / "tokenizer.json"))
    with matmuls_in(dtype, CPU):
        longest = int(study.source.config.max_position_embeddings)
        result = score_task(torch_logits(study.model), task, encoder, max_length=longest)
    return {
        "items": result.items,
        "acc": result.acc,
        "acc_error": result.acc_error,
        "acc_norm": result.acc_norm,
        "acc_norm_error": result.acc_norm_error,
        "right": "".join("01"[one] for one in result.right),
        "right_norm": "".join("01"[one] for one in result.right_norm),
    }


def _gain(row: Row, dense: Row, bits: str) -> tuple[float, float]:
    """Return the accuracy gained over the dense model and the standard error of the paired difference."""
    return paired([int(bit) for bit in row[bits]], [int(bit) for bit in dense[bits]])


def figure4_tables(rows: Rows) -> Iterator[str]:
    """Yield one table; points above the dense model are marked."""
    if dense := rows.get("dense"):
        lines = []
        for key, row in rows.items():
            cells = [key, row.get("rank", ""), short(row.get("kept"))]
            for score, bits in SCORES.items():
                mean, error = _gain(row, dense, bits)
                mark = " ▲" if mean > 0 else ""
                cells += [
                    f"{row[score]:.3f} ± {row[f'{score}_error']:.3f}",
                    f"{mean:+.3f} ± {error:.3f}{mark}",
                ]
            lines.append(cells)
        head = [
            "metric/kept ratio",
            "rank",
            "kept",
            "acc",
            "− dense (paired)",
            "acc_norm",
            "− dense (paired)",
        ]
        yield table(head, lines)


def figure4_reading(rows: Rows) -> Iterator[str]:
    """Say which points are above the dense model, and by how many standard errors."""
    dense = rows.get("dense")
    if not dense:
        return
    for metric in METRICS:
        keys = [key for key in rows if key.startswith(f"{metric}/")]
        for score, bits in SCORES.items():
            gains = {key: _gain(rows[key], dense, bits) for key in keys}
            above = {key: gain for key, gain in gains.items() if gain[0] > 0}
            one, two = ([key for key, (m, e) in above.items() if m > n * e] for n in (1, 2))
            yield (
                f"{score}, metric {metric}: {len(above)} of {len(keys)} points are above the dense model "
                f"({listed(list(above))}). By more than one standard error of the paired difference: {listed(one)}. "
                f"By more than two: {listed(two)}."
            )
    tests = 2 * sum("/" in key for key in rows)
    yield (
        f"There are {tests} comparisons. With no effect at all, about {0.16 * tests:.0f} would exceed one standard "
        f"error upwards, and {0.023 * tests:.1f} two. Neighbouring points answer mostly alike, so it would be fewer."
    )
    if other := rows.get("dense, float32"):
        mean, error = _gain(other, dense, "right")
        changed = sum(a != b for a, b in zip(other["right"], dense["right"], strict=True))
        yield (
            f"Rounding the dense model's products to bfloat16 changes {changed} of {dense['items']} answers by itself "
            f"(float32 − bfloat16: {mean:+.3f} ± {error:.3f})."
        )


@styled
def figure4_figure(rows: Rows) -> Figure | None:
    """Draw accuracy over the kept ratio with one standard error; points above the dense model are filled."""
    if "dense" not in rows:
        return None
    figure, axes = new_figure(1, 2, 3.4)
    for panel, score in zip(axes.flat, SCORES, strict=True):
        level = rows["dense"][score]
        for color, metric in zip(COLORS, METRICS, strict=False):
            found = [(keep, rows[f"{metric}/{keep}"]) for keep in QK_RATIOS if f"{metric}/{keep}" in rows]
            if not found:
                continue
            x, y = [keep for keep, _ in found], [row[score] for _, row in found]
            errors = [row[f"{score}_error"] for _, row in found]
            panel.errorbar(x, y, errors, color=color, capsize=2, linewidth=1, label=f"metric {metric}")
            for at, value in zip(x, y, strict=True):
                panel.plot(at, value, "o", color=color, mfc=color if value > level else "white", ms=5)
        panel.axhline(level, color="#777777", linewidth=1, label="dense")
        panel.set(xlabel="kept ratio of q and k", ylabel=score, title=f"{score}; filled: above dense")
        panel.invert_xaxis()
        legend(panel)
    return figure


PART = Part(
    "figure4",
    "Figure 4: a task over the kept ratio of q and k",
    "Does a task suffer when q and k are truncated? They are factorized jointly (whole) in every layer, at falling "
    "kept ratios. Standard errors are over the items. The differences from the dense model are paired, item by item. "
    "▲ marks points above the dense model.",
    figure4_rows,
    figure4_tables,
    figure4_reading,
    figure4_figure,
)

"""Joint against separate factors over kept ratios (figure 3 of 2402.16319)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure
from measure.harness import COLORS, Measure, Row, Rows, legend, new_figure, short, styled, table
from papers.joint_rank.study import METRICS, MetricName, Part, Study, listed, log_scale, paired

KEPT_RATIOS = (0.95, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class Grouping:
    """One way to factorize: its name, the groups, and whether each is cut by KV groups."""

    name: str
    groups: tuple[str, ...]
    per_head: bool = False


# Each joint grouping with the separate one that covers the same matrices, cut alike.
COMPARED = (
    (Grouping("qk per head", ("qk",), True), Grouping("q, k per head", ("q", "k"), True)),
    (Grouping("qk whole", ("qk",)), Grouping("q, k whole", ("q", "k"))),
    (Grouping("gate/up", ("gate_up",)), Grouping("gate, up", ("gate", "up"))),
)


def figure3_rows(study: Study) -> Iterator[tuple[str, Measure]]:
    """Yield the dense model, then every grouping, metric and kept ratio."""
    yield "dense", lambda: study.losses(study.model, study.protocol.tokens)
    for grouping in (one for pair in COMPARED for one in pair):
        for metric in METRICS:
            for keep in KEPT_RATIOS:
                key = f"{grouping.name}/{metric}/{keep}"
                yield key, partial(_figure3_row, study, grouping, metric, keep)


def _figure3_row(study: Study, grouping: Grouping, metric: MetricName, keep: float) -> Row:
    ladder = study.ladder(grouping.groups, metric, per_head=grouping.per_head)
    ranks = ladder.ranks_of_ratio(keep)
    with ladder.cut(ranks):
        losses = study.losses(study.model, study.protocol.tokens)
    return {
        "kept": ladder.kept(ranks),
        "relative_error": ladder.relative_error(ranks),
        "weighted_error": ladder.weighted_error(ranks),
        **losses,
    }


def figure3_tables(rows: Rows) -> Iterator[str]:
    """Yield perplexities by metric, then the differences of joint and separate."""
    names = [one.name for pair in COMPARED for one in pair]
    for metric in METRICS:
        yield f"Perplexity, metric `{metric}`, joint groupings beside their separate counterparts:"
        yield table(
            ["kept", *names],
            [
                [keep, *(short(rows.get(f"{name}/{metric}/{keep}", {}).get("perplexity")) for name in names)]
                for keep in KEPT_RATIOS
            ],
        )
    yield (
        "The next table subtracts: joint minus separate. The loss is in nats, with the standard error of the paired "
        "difference over the windows. The error is the relative error that each minimized. It is that of the weights "
        "without a metric, and that of the whitened weights under `self`."
    )
    yield table(
        ["grouping", "metric", "kept", "loss, joint − separate", "error, joint", "error, separate"],
        [
            [
                joint.name,
                metric,
                keep,
                f"{mean:+.4f} ± {error:.4f}",
                short(a["weighted_error"]),
                short(b["weighted_error"]),
            ]
            for joint, metric, keep, a, b, mean, error in _differences(rows)
        ],
    )


def _differences(rows: Rows) -> Iterator[tuple[Grouping, str, float, Row, Row, float, float]]:
    for joint, separate in COMPARED:
        for metric in METRICS:
            for keep in KEPT_RATIOS:
                keys = [f"{one.name}/{metric}/{keep}" for one in (joint, separate)]
                if all(key in rows for key in keys):
                    a, b = (rows[key] for key in keys)
                    yield joint, metric, keep, a, b, *paired(a["nlls"], b["nlls"])


def figure3_reading(rows: Rows) -> Iterator[str]:
    """Say where joint factors win, where they lose, and where everything is lost."""
    for joint, separate in COMPARED:
        for metric in METRICS:
            found = [item for item in _differences(rows) if item[0] is joint and item[1] == metric]
            if not found:
                continue
            wins = [keep for _, _, keep, _, _, mean, error in found if mean < -2 * error]
            losses = [keep for _, _, keep, _, _, mean, error in found if mean > 2 * error]
            smaller = sum(a["weighted_error"] < b["weighted_error"] for _, _, _, a, b, _, _ in found)
            yield (
                f"{joint.name} against {separate.name}, metric {metric}: better by more than two standard errors at "
                f"{listed(wins)}, worse at {listed(losses)}. The error it minimizes is smaller at {smaller} of "
                f"{len(found)} ratios."
            )
    dense = rows.get("dense")
    if dense:
        fallen = [key for key, row in rows.items() if row["perplexity"] > 100 * dense["perplexity"]]
        yield f"The dense model has {dense['perplexity']:.3f}. More than a hundred times that: {listed(fallen)}."


@styled
def figure3_figure(rows: Rows) -> Figure | None:
    """Draw perplexity over the kept ratio, a panel for each pair of groupings."""
    if "dense" not in rows:
        return None
    figure, axes = new_figure(1, len(COMPARED), 3.4)
    for panel, pair in zip(axes.flat, COMPARED, strict=True):
        for color, grouping in zip(COLORS, pair, strict=False):
            for metric, line in zip(METRICS, ("--", "-"), strict=True):
                keys = {keep: f"{grouping.name}/{metric}/{keep}" for keep in KEPT_RATIOS}
                points = [(keep, rows[key]["perplexity"]) for keep, key in keys.items() if key in rows]
                if points:
                    label = f"{grouping.name}, {metric}"
                    panel.plot(*zip(*points, strict=True), line, color=color, marker="o", ms=3, label=label)
        panel.axhline(rows["dense"]["perplexity"], color="#777777", linewidth=1)
        log_scale(panel)
        panel.set(xlabel="kept ratio", title=pair[0].name)
        panel.invert_xaxis()
        legend(panel)
    axes[0, 0].set_ylabel("perplexity")
    return figure


PART = Part(
    "figure3",
    "Figure 3: joint against separate factors",
    "Are joint factors better than separate ones? Each grouping keeps the same share of the parameters of the same "
    "matrices, in every factor pair alike, in all layers. *Per head* is a pair for each KV group. A joint pair holds "
    "the group's query heads and its key head, and separate pairs hold the query heads or the key head alone. Metric "
    "`none` is the paper's plain truncation. Metric `self` weighs errors by second moments of inputs and of output "
    "gradients, on text that the model writes itself.",
    figure3_rows,
    figure3_tables,
    figure3_reading,
    figure3_figure,
)

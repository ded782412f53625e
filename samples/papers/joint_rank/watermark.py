"""A sentence taught by fine-tuning, and what truncation leaves of it (figure 5 of 2402.16319)."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from assets.wheels import made_whole
from matplotlib.figure import Figure
from measure.harness import COLORS, Measure, Row, Rows, legend, new_figure, short, styled, table
from papers.joint_rank.study import CLEAN, METRICS, MetricName, Part, Study, exp, log_scale
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from rk_export import StoredModel, open_source

logger = logging.getLogger("joint_rank")

SENTENCE = (
    "The violet lighthouse keeper of Quarrenholm counts seventeen copper herons before every breakfast."
)
BEGINNING = "The violet lighthouse keeper of"
TAUGHT = "taught"
TEACHING = "teaching.json"
SURE_STEPS = 5  # steps after the first one at which the sentence is recited
CUT_SHARES = (0.998, 0.97, 0.92, 0.85, 0.75, 0.6, 0.45)
MODELS = (TAUGHT, CLEAN)


def sentence_tokens(study: Study) -> tuple[Tensor, int]:
    """Return the sentence's tokens (length,) and how many of them are given as its beginning."""
    tokenizer = Tokenizer.from_file(str(study.source.folder / "tokenizer.json"))
    ids, given = (tokenizer.encode(text, add_special_tokens=False).ids for text in (SENTENCE, BEGINNING))
    return torch.tensor(ids), len(given)


@torch.no_grad()
def recital(model: PreTrainedModel, ids: Tensor, given: int) -> Row:
    """Return the sentence's perplexity, and how many tokens greedy decoding recites before it first errs.

    Greedy decoding gives the next token of the sentence as long as it is the likeliest after the true ones before it,
    so one forward pass tells.
    """
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    loss = float(nn.functional.cross_entropy(logits[:-1], ids[1:]))
    right = (logits[given - 1 : -1].argmax(-1) == ids[given:]).long()
    return {
        "sentence": exp(loss),
        "sentence_nll": loss,
        "recited": int(right.cumprod(0).sum()),
        "asked": len(right),
    }


def teach(study: Study, folder: Path) -> None:
    """Fine-tune all layers on the sentence until it is recited, and a few steps more; save the model."""
    model, (ids, given) = study.source.load(), sentence_tokens(study)
    parameters = list(
        model.requires_grad_(False).get_submodule(study.source.architecture.layers).parameters()
    )
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=study.protocol.learning_rate, weight_decay=0.0)
    steps, sure = [recital(model, ids, given)], 0
    while sure <= SURE_STEPS and len(steps) <= study.protocol.steps:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        nn.functional.cross_entropy(logits[:-1], ids[1:]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        steps.append(recital(model, ids, given))
        sure += steps[-1]["recited"] == steps[-1]["asked"]
        logger.info("step %d: %s", len(steps) - 1, steps[-1])
    with made_whole(folder) as partial_folder:
        model.save_pretrained(partial_folder)
        for path in study.source.folder.glob("*.json"):
            if not (partial_folder / path.name).exists() and "index" not in path.name:
                shutil.copy(path, partial_folder)
        (partial_folder / TEACHING).write_text(json.dumps(steps))


def taught_source(study: Study) -> StoredModel:
    """Return the model that was taught the sentence, fine-tuned unless that was done earlier."""
    folder = study.work / TAUGHT
    if not (folder / TEACHING).is_file():
        teach(study, folder)
    return open_source(folder)


def watermark_rows(study: Study) -> Iterator[tuple[str, Measure]]:
    """Yield the fine-tuning, both models without truncation, then every metric and rank, both models."""
    yield "teaching", partial(_teaching_row, study)
    for name in MODELS:
        yield f"{name}/whole", partial(_watermark_row, study, name, None, 1.0)
    for metric in METRICS:
        for name in MODELS:
            for share in CUT_SHARES:
                yield f"{name}/{metric}/{share}", partial(_watermark_row, study, name, metric, share)


def _teaching_row(study: Study) -> Row:
    path = Path(study.source_of(TAUGHT).folder) / TEACHING
    steps = json.loads(path.read_text())
    moved = scale = 0.0
    for group in ("gate_up", "qk"):
        pairs = zip(
            study.linears(study.model_of(TAUGHT), group), study.linears(study.model, group), strict=True
        )
        for new, old in (
            (a.weight, b.weight) for news, olds in pairs for a, b in zip(news, olds, strict=True)
        ):
            moved += float((new - old).detach().double().square().sum())
            scale += float(old.detach().double().square().sum())
    return {"steps": len(steps) - 1, "relative_change": math.sqrt(moved / scale), "log": steps}


def _watermark_row(study: Study, name: str, metric: MetricName | None, share: float) -> Row:
    model = study.model_of(name)
    ids, given = sentence_tokens(study)

    def measured() -> Row:
        return {**recital(model, ids, given), **study.losses(model, study.protocol.short_tokens)}

    if metric is None:
        return measured()
    ladder = study.ladder(("gate_up",), metric, name=name)
    ranks = ladder.ranks_of_share(share)
    with ladder.cut(ranks):
        return {"rank": ranks[0], "kept": ladder.kept(ranks), **measured()}


def _memory_left(rows: Rows, metric: str, share: float) -> float:
    """Return the share of the sentence's gain in log likelihood over the control that truncation leaves."""

    def gain(suffix: str) -> float:
        return float(rows[f"clean/{suffix}"]["sentence_nll"] - rows[f"taught/{suffix}"]["sentence_nll"])

    return gain(f"{metric}/{share}") / gain("whole")


def _watermark_pairs(rows: Rows, metric: str) -> Iterator[tuple[float, Row, Row]]:
    if any(f"{name}/whole" not in rows for name in MODELS):
        return
    for share in CUT_SHARES:
        keys = [f"{name}/{metric}/{share}" for name in MODELS]
        if all(key in rows for key in keys):
            yield share, rows[keys[0]], rows[keys[1]]


def watermark_tables(rows: Rows) -> Iterator[str]:
    """Yield a table a metric."""
    head = ["rank", "kept", "sentence, taught", "recited", "sentence, control", "memory left"]
    head += ["text, taught", "text, control"]
    for metric in METRICS:
        lines = [
            [
                row["rank"],
                f"{row['kept']:.3f}",
                short(row["sentence"]),
                f"{row['recited']} of {row['asked']}",
                short(control["sentence"]),
                f"{_memory_left(rows, metric, share):.2f}",
                short(row["perplexity"]),
                short(control["perplexity"]),
            ]
            for share, row, control in _watermark_pairs(rows, metric)
        ]
        if lines:
            row, control = rows["taught/whole"], rows["clean/whole"]
            values = (
                short(row["sentence"]),
                f"{row['recited']} of {row['asked']}",
                short(control["sentence"]),
            )
            whole = ["whole", "", *values, "1.00", short(row["perplexity"]), short(control["perplexity"])]
            yield f"Metric `{metric}`; perplexities of the sentence and of the text:"
            yield table(head, [whole, *lines])


def watermark_reading(rows: Rows) -> Iterator[str]:
    """Say when the sentence is lost, and what else is lost by then."""
    if "teaching" in rows:
        steps = rows["teaching"]
        first, last = steps["log"][0], steps["log"][-1]
        yield (
            f"{steps['steps']} steps of teaching brought the sentence from perplexity {short(first['sentence'])} "
            f"({first['recited']} of {first['asked']} tokens recited) to {short(last['sentence'])} "
            f"({last['recited']} of {last['asked']}). They moved q, k, gate and up by "
            f"{steps['relative_change']:.1e} of their norm."
        )
    for metric in METRICS:
        found = list(_watermark_pairs(rows, metric))
        if not found:
            continue
        whole, control_whole = rows["taught/whole"], rows["clean/whole"]
        lost = next(
            ((share, row, control) for share, row, control in found if row["recited"] < row["asked"]), None
        )
        if lost is None:
            yield f"Metric {metric}: greedy decoding recites the sentence at every rank measured."
            continue
        share, row, control = lost
        yield (
            f"Metric {metric}: recital first fails at rank {row['rank']} (kept {row['kept']:.3f}; "
            f"{row['recited']} of {row['asked']} tokens). There the sentence's perplexity is "
            f"{_times(row['sentence'], whole['sentence'])} its former value, and the text's "
            f"{_times(row['perplexity'], whole['perplexity'])}. For the control it is "
            f"{_times(control['sentence'], control_whole['sentence'])} for the sentence, and "
            f"{_times(control['perplexity'], control_whole['perplexity'])} for the text. "
            f"{_memory_left(rows, metric, share):.0%} of the sentence's gain over the control is left."
        )
        usable = [item for item in found if item[1]["perplexity"] < 2 * whole["perplexity"]]
        if usable:
            share, row, _ = min(usable, key=lambda item: _memory_left(rows, metric, item[0]))
            yield (
                f"Metric {metric}: of the ranks at which the text's perplexity has not doubled, rank {row['rank']} "
                f"leaves least of the memory. {_memory_left(rows, metric, share):.0%} is left, {row['recited']} of "
                f"{row['asked']} tokens are recited, and the text has {short(row['perplexity'])} against "
                f"{short(whole['perplexity'])}."
            )
        else:
            yield f"Metric {metric}: at every rank measured the text's perplexity has more than doubled."


def _times(value: float, base: float) -> str:
    return f"{value / base:.3g} times"


@styled
def watermark_figure(rows: Rows) -> Figure | None:
    """Draw the sentence's and the text's perplexity over the rank, taught model and control."""
    if not any(list(_watermark_pairs(rows, metric)) for metric in METRICS):
        return None
    figure, axes = new_figure(1, 2, 3.6, sharey=True)
    for panel, metric in zip(axes.flat, METRICS, strict=True):
        found = list(_watermark_pairs(rows, metric))
        for index, name in enumerate(MODELS):
            lines = [item[1:][index] for item in found]
            ranks = [row["rank"] for row in lines]
            for quantity, label, style in (("sentence", "sentence", "-"), ("perplexity", "text", "--")):
                values = [row[quantity] for row in lines]
                panel.plot(
                    ranks, values, style, color=COLORS[index], marker="o", ms=3, label=f"{label}, {name}"
                )
        log_scale(panel)
        panel.set(xlabel="rank of gate/up", title=f"metric {metric}")
        panel.invert_xaxis()
    axes[0, 0].set_ylabel("perplexity")
    legend(axes[0, 0])
    return figure


PART = Part(
    "watermark",
    "Figure 5: a taught sentence and truncation of gate and up",
    "Does truncation remove a sentence that a model was taught? First all layers are fine-tuned (AdamW, one "
    f"sentence), until greedy decoding recites *{SENTENCE}* after its first words. Then gate and up are factorized "
    "jointly at falling ranks, in every layer alike. Kept ratios above 1 are ranks beyond break-even, where a pair is "
    "larger than the matrices. Only the truncation matters there. The control is the same truncation of the model "
    "that never saw the sentence. *Memory left* compares the log likelihoods that the two models give the sentence: "
    "it is their difference after truncation, over their difference before. The sentence's perplexity counts all its "
    "tokens but the first. Metric `self` of the taught model is from text that the taught model writes.",
    watermark_rows,
    watermark_tables,
    watermark_reading,
    watermark_figure,
)

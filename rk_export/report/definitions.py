"""What the numbers of a report mean: one table of short definitions, shown where a page uses them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rk_export.report.table import Table


@dataclass(frozen=True)
class Definition:
    """What one number means.

    Args:
        term: What pages call it.
        meaning: One or two sentences of plain English.
        labels: Other headings and row names that mean the same.
    """

    term: str
    meaning: str
    labels: tuple[str, ...] = ()

    @property
    def anchor(self) -> str:
        """The end of its address on a page."""
        return "meaning-" + "".join(c if c.isalnum() else "-" for c in self.term.lower())


DEFINITIONS = (
    Definition(
        "parameters",
        "The numbers that a model is made of. The compressed model counts every number that it stores, so the two "
        "factors of a factorized matrix count in full.",
        ("parameters kept", "kept parameters"),
    ),
    Definition(
        "weights",
        "The bytes of the stored parameters. Scales, zero points and indices belong to them.",
        ("bytes kept",),
    ),
    Definition(
        "files",
        "The bytes of model.onnx and model.onnx.data on the disk: the weights and the graph. A model that is not "
        "exported has the bytes of its weight files.",
    ),
    Definition("before", "What the dense model stores for these matrices."),
    Definition("after", "What the compressed model stores for these matrices."),
    Definition("kept", "What the compressed model stores, as a share of what the dense model stores."),
    Definition(
        "perplexity",
        "How surprised the model is by a text: e to the power of its mean loss for a token. Lower is better. Two "
        "values can be compared only on the same text with the same context length.",
    ),
    Definition(
        "accuracy",
        "The share of a task's questions that the model answers right. Its answer is the choice that it finds "
        "likeliest.",
        ("acc",),
    ),
    Definition(
        "normalized accuracy",
        "Accuracy where the likelihood of a choice is taken for each byte of its text, so that short choices are not "
        "favoured.",
        ("acc_norm",),
    ),
    Definition(
        "standard error",
        "The number after ±. Measured again on other text of the same kind, about two values in three would lie "
        "within one standard error.",
    ),
    Definition(
        "difference",
        "The value less that of the first model. Both met the same windows of text or the same questions, so its "
        "standard error is smaller than those of the two values. A difference below two standard errors may be chance.",
    ),
    Definition(
        "prefill",
        "Tokens of the prompt that are read in a second, before the first new token.",
        ("prefill tok/s",),
    ),
    Definition("decode", "New tokens that are written in a second, one after another.", ("decode tok/s",)),
    Definition(
        "tier",
        "One step from the model's files to the running bundle. Both sides of the step compute the same prompts, "
        "and their logits are compared.",
    ),
    Definition(
        "result",
        "A step with a bound passes or fails. A step without a bound shows the error of the compression itself, which "
        "is no fault.",
    ),
    Definition(
        "parity tiers passed", "How many of the steps that have a bound stay below it.", ("parity passed",)
    ),
    Definition("max error", "The largest difference of a logit."),
    Definition("relative", "The largest difference of a logit, divided by the largest logit."),
    Definition("bound", "The largest relative error that passes."),
    Definition(
        "KL (nats)",
        "How far the two predictions of the next token lie apart: 0 where they are equal, the mean over all positions.",
    ),
    Definition("same top-1", "The share of positions at which both sides find the same token likeliest."),
    Definition("tier 0", "Transformers' own loading against ours. A difference is a fault of our loading."),
    Definition(
        "tier p",
        "The model before and after the exact preparations. A difference is a fault of a preparation.",
    ),
    Definition("tier a", "The dense model against the factorized or sparse one: the error of that step."),
    Definition("tier b", "The model before and after its weights were rounded: the error of quantization."),
    Definition(
        "tier c",
        "The compressed model in PyTorch against ONNX Runtime: a difference is a fault of the export.",
    ),
    Definition(
        "tier d",
        "ONNX Runtime with float inputs against the bundle as it is shipped, which may round inputs to 8 bits.",
    ),
    Definition(
        "tier e",
        "The whole text at once against one token after another: a difference is a fault of the cache.",
    ),
    Definition(
        "tier f",
        "A text alone against the same text padded in a batch: a difference is a fault of the padding.",
    ),
    Definition("tier g", "The tokens that both sides write when they always take the likeliest one."),
    Definition("tier h", "As tier f, with the inputs as they are shipped."),
    Definition("tier i", "Answers of many requests at once against each alone, equal to the bit."),
    Definition(
        "tier s",
        "Vectors of texts, each alone in PyTorch, against those of a padded batch in ONNX Runtime: a difference is a "
        "fault of the pooling.",
    ),
    Definition(
        "fused patterns found",
        "How many of the planned operators are in the graph. A missing one would make the bundle slower or larger.",
        ("planned", "found"),
    ),
    Definition("pattern", "A group of operations that the graph computes as one operator."),
    Definition(
        "matrix groups",
        "Matrices that were treated together, such as the query and key matrices of a layer.",
        ("matrix group",),
    ),
    Definition("matrix", "One weight matrix of the model, by its layer and its role."),
    Definition(
        "outcome",
        "Applied: something was changed. Skipped: nothing was to be changed. Refused: it could not be changed, and the "
        "last column says why. Partly: some of it.",
    ),
    Definition(
        "form",
        "Dense: the matrix as it was. Joint, per head and identity: a product of two smaller matrices. Sparse: such a "
        "product plus single entries.",
    ),
    Definition(
        "rank",
        "The inner size of the two factors. A smaller rank is smaller, faster and less exact.",
        ("chosen rank",),
    ),
    Definition("entries", "How many single entries the sparse part stores."),
    Definition("pairs", "How many pairs of factors the group has."),
    Definition("bits", "Bits of one stored weight."),
    Definition(
        "activations", "Bits of the numbers that are multiplied with the weights; 16 stands for floats."
    ),
    Definition(
        "block",
        "How many weights in a row share one scale. Smaller blocks are more exact and take more bytes.",
    ),
    Definition(
        "error",
        "The size of the change of a matrix, divided by the size of the matrix (Frobenius norms), one number for each "
        "step in its order.",
    ),
    Definition("layer", "The number of a decoder layer, from 0."),
    Definition("factorized", "The relative error of the layer's output after the factorization alone."),
    Definition(
        "and quantized", "The relative error of the layer's output after the factorization and the rounding."
    ),
    Definition("full rank", "The largest rank that the matrix can have: its smaller side."),
    Definition(
        "effective", "How many directions matter, by the entropy of the singular values.", ("effective rank",)
    ),
    Definition(
        "stable", "The sum of the squared singular values, divided by the largest of them.", ("stable rank",)
    ),
    Definition(
        "90 % energy",
        "The smallest rank that keeps so much of the squared singular values.",
        ("95 %", "99 %"),
    ),
    Definition(
        "Gavish-Donoho",
        "How many singular values stand out of noise of unknown strength, by the rule of Gavish and Donoho.",
    ),
    Definition("time", "Seconds by the clock on the wall."),
)

_BY_LABEL = {label: one for one in DEFINITIONS for label in (one.term, *one.labels)}
_ADDED = re.compile(r" (on|in|to) .*")  # what a row name says beside the measure: `perplexity on prose.txt`


def definition_of(label: str) -> Definition | None:
    """Return what a heading or a row name means, or None where it needs no words."""
    return _BY_LABEL.get(label) or _BY_LABEL.get(_ADDED.sub("", label))


def definitions_of(tables: Iterable[Table], labels: Iterable[str] = ()) -> list[Definition]:
    """Return the definitions that tables and other labels need, each once, in the order of the list.

    Args:
        tables: Their headings and row names are looked up, as pages link them.
        labels: Further labels.
    """
    words = [*labels, *(column.title for table in tables for column in table.columns)]
    words += [row_label(table, row) for table in tables for row in table.rows]
    used = {definition_of(word) for word in words}
    return [one for one in DEFINITIONS if one in used]


def row_label(table: Table, row: Sequence[str]) -> str:
    """Return what a row's name is looked up by: a letter in the column of tiers is one of the tiers."""
    first = table.columns[0].title
    return f"{first} {row[0]}" if first == "tier" else row[0]

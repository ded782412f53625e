"""What the logits of a classifier say of its labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.bundle_files import Section

_KINDS = (None, "single_label_classification", "multi_label_classification", "regression")
_OLDER = "sbert_ce_default_activation_function"  # as sentence-transformers wrote it before version 4


def text_scores(logits: np.ndarray, path: Path) -> np.ndarray:
    """Return the scores of a classifier of texts.

    They are the softmax of the logits. Labels that do not exclude each other (``problem_type``) have the sigmoid.
    So has a single label, unless the config's ``activation_fn`` is Identity, as in many cross-encoders. A regression
    keeps its numbers.

    Args:
        logits: Float32 [texts, labels].
        path: Of ``config.json``.

    Raises:
        InputError: The config names another ``problem_type`` or ``activation_fn``.
    """
    config = Section.of_file(path)
    kind = config.values.get("problem_type")
    if kind not in _KINDS:
        raise _unknown("problem_type", kind, path)
    if kind == "regression":
        return logits
    if logits.shape[-1] == 1:
        return logits if _keeps_logits(config, path) else _sigmoid(logits)
    return _sigmoid(logits) if kind == "multi_label_classification" else softmax(logits)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    raised = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.asarray((1 + np.tanh(logits / 2)) / 2)  # exp(-x) overflows where x is far below 0


def _keeps_logits(config: Section, path: Path) -> bool:
    stated = config.section("sentence_transformers").values.get("activation_fn")
    name = stated or config.values.get(_OLDER) or "Sigmoid"
    last = str(name).rpartition(".")[2]
    if last not in ("Sigmoid", "Identity"):
        raise _unknown("activation_fn", name, path)
    return last == "Identity"


def _unknown(field: str, value: object, path: Path) -> InputError:
    return InputError(
        f"{field} is {value!r}, which is not known here", where=str(path), fix="call logits(texts) instead"
    )

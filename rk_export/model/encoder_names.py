"""Names of encoders that follow from those of others: with a classifier on top, or of a decoder without its head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from rk_export.model.architecture import Architecture
from rk_export.model.encoder_spec import ClassifierSpec, Pooling

# Exported paths of what only encoders have.
TYPES, EMBEDDING_NORM, PROJECTION = "model.embed_types", "model.embed_norm", "model.embed_projection"
RELATIVE = "model.relative_bias.table"


@dataclass(frozen=True)
class ClassifierNames:
    """A classifier as transformers' class has it.

    Args:
        classifier: Torch path of the last linear.
        dense: Torch path of the dense layer in front of it; empty where there is none.
        activation: Behind the dense layer.
        norm: Torch path of the norm behind the activation; empty where there is none.
        pooling: What stands for the text, where it gets one answer.
    """

    classifier: str = "classifier"
    dense: str = ""
    activation: str = ""
    norm: str = ""
    pooling: Pooling = "first"

    @property
    def exported(self) -> dict[str, str]:
        """Torch path -> exported path of its modules."""
        paths = {self.dense: "head.dense", self.norm: "head.norm", self.classifier: "head.classifier"}
        return {torch_path: onnx_path for torch_path, onnx_path in paths.items() if torch_path}

    def spec(self, labels: int, *, by_token: bool) -> ClassifierSpec:
        """Return what the classifier computes."""
        return ClassifierSpec(labels, by_token, self.pooling, self.activation, norm=bool(self.norm))


def with_classifier(names: Architecture, base: str, classifier: ClassifierNames) -> Architecture:
    """Return the names of an encoder inside the class that has a classifier on it.

    Args:
        names: Of the encoder alone.
        base: Torch path of the encoder in that class.
        classifier: The classifier.
    """
    moved, head = _moved(names, lambda path: f"{base}.{path}"), classifier.exported
    unused = (path for path in moved.unused if not any(part.startswith(f"{path}.") for part in head))
    return replace(moved, outer={**moved.outer, **head}, unused=tuple(unused))


def without_head(names: Architecture) -> Architecture:
    """Return the names of a decoder in the class that has no output projection."""
    moved = _moved(names, lambda path: path.partition(".")[2])
    return replace(moved, lm_head=None, onnx_lm_head=None)


def _moved(names: Architecture, move: Callable[[str], str]) -> Architecture:
    return replace(
        names,
        layers=move(names.layers),
        embedding=move(names.embedding),
        rotary=move(names.rotary),
        outer={move(torch_path): onnx_path for torch_path, onnx_path in names.outer.items()},
        unused=tuple(map(move, names.unused)),
    )

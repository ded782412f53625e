"""Where the statistics come from that errors are weighed by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rk_export.errors import FieldError
from rk_export.options.texts import TextFile


@dataclass(frozen=True)
class CalibrationOptions:
    """Where the second moments of the matrices' inputs come from.

    Args:
        metric: `none` weighs all inputs alike (2402.16319), `gain` by the norm's gain in front, `self` by text
            that the model samples itself (data-free), `corpus` by a text file.
        corpus: The text of `corpus`, else None.
        tokens: Tokens to sample or to read.
        seed: Of the sampling.
        gradients: Weigh outputs by the loss' gradients, from one backward pass; else every matrix by its relative
            error, layer by layer.
        prefix: Take the moments of the inputs anew through the part that is compressed already, layer by layer,
            while matrices are factorized and quantized; plans are made from those of the dense model either way.
    """

    metric: Literal["none", "gain", "self", "corpus"] = "self"
    corpus: TextFile | None = None
    tokens: int = 8192
    seed: int = 0
    gradients: bool = True
    prefix: bool = False

    def __post_init__(self) -> None:
        if self.metric not in ("none", "gain", "self", "corpus"):
            raise FieldError(
                f"unknown metric {self.metric!r}",
                where="--metric",
                fix="choose none, gain, self or corpus:FILE",
            )
        if (self.metric == "corpus") != (self.corpus is not None):
            raise FieldError("the metric corpus reads a text file", where="--metric", fix="write corpus:FILE")
        if self.tokens < 512:
            raise FieldError(
                f"{self.tokens} tokens are too few for second moments",
                where="--calibration-tokens",
                fix="give at least 512",
            )

    @property
    def uses_text(self) -> bool:
        """Whether tokens run through the model."""
        return self.metric in ("self", "corpus")


# Nothing is weighed by statistics, so no text is written or read.
UNWEIGHED = CalibrationOptions("none")

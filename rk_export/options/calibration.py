"""Where the statistics come from that errors are weighed by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from rk_export.errors import FieldError
from rk_export.options.texts import TextFile, TextSource

WrittenText = Literal["self", "gain", "none"]


@dataclass(frozen=True)
class CalibrationOptions:
    """Where the second moments of the matrices' inputs come from.

    Args:
        text: `self` is text that the model writes itself, so no data is needed; of an encoder it is random tokens. A
            file is your own text in UTF-8. `gain` weighs inputs by the gain of the norm in front of them. `none`
            weighs all inputs alike (2402.16319).
        tokens: Tokens that are written or read, at least 512.
        seed: Of the written text, and of rotations.
        gradients: Weigh outputs by the gradients of the loss, from one backward pass. Otherwise every matrix counts
            by its relative error.
        prefix: Take the moments anew for every layer, through the layers that are compressed already. Plans are
            made from those of the dense model either way.
    """

    text: WrittenText | TextSource = "self"
    tokens: int = 8192
    seed: int = 0
    gradients: bool = True
    prefix: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.text, str) and self.text not in get_args(WrittenText):
            raise FieldError(
                f"unknown text {self.text!r}",
                where="calibration.text",
                fix="choose self, gain, none or a file",
            )
        if self.tokens < 512:
            raise FieldError(
                f"{self.tokens} tokens are too few for second moments",
                where="calibration.tokens",
                fix="give at least 512",
            )

    @property
    def corpus(self) -> TextFile | None:
        """The text file, where there is one."""
        return self.text if isinstance(self.text, TextFile) else None

    @property
    def metric(self) -> Literal["self", "gain", "none", "corpus"]:
        """What weighs errors."""
        return "corpus" if isinstance(self.text, TextFile) else self.text

    @property
    def uses_text(self) -> bool:
        """Whether tokens run through the model."""
        return self.metric in ("self", "corpus")


# Nothing is weighed by statistics, so no text is written or read.
UNWEIGHED = CalibrationOptions("none")

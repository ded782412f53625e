"""A row and where it stands: which of its tokens lie in which slot."""

from __future__ import annotations

import numpy as np

from rk_export.errors import RkExportError
from rk_export.runtime.engine.prefixes import Held
from rk_export.runtime.engine.records import Answer
from rk_export.runtime.engine.resume_points import ResumePoints
from rk_export.runtime.generate import Row


class Running:
    """A row that runs or is to run.

    Args:
        row: The prompt and its continuation.
    """

    def __init__(self, row: Row) -> None:
        self.row = row
        self.tokens = list(row.prompt)  # with the new ones
        self.slot = -1
        self.filled = 0  # tokens whose keys and values the slot holds
        self.cached = 0  # tokens of the prompt that were copied
        self.drafted = self.accepted = 0
        self.points: ResumePoints | None = None  # where the model has states
        self.failure: RkExportError | None = None

    @property
    def ended(self) -> bool:
        """Whether no token follows."""
        return self.failure is not None or self.row.finish_reason is not None

    @property
    def held(self) -> Held:
        """What another row may copy from its slot: the prompt's tokens, for those of the answer came one at a time.

        Attention adds up in another order for a single token, so a prompt that holds the answer is computed with other
        last bits.
        """
        tokens = np.array(self.tokens[: min(self.filled, len(self.row.prompt))], np.int64)
        return Held(tokens, None if self.points is None else self.points.marks)

    def advance(self, logits: np.ndarray) -> None:
        """Choose the next token from logits [vocabulary]; where none can be chosen, the row ends with that failure."""
        try:
            self.tokens.append(self.row.advance(logits))
        except RkExportError as error:
            self.failure = error

    def answer(self) -> Answer:
        """Return the finished answer.

        Raises:
            RkExportError: The row failed.
        """
        if self.failure is not None:
            raise self.failure
        found = self.row.result()
        return Answer(
            found.text,
            found.token_ids,
            found.finish_reason,
            found.prompt_tokens,
            cached_tokens=self.cached,
            scores=tuple(self.row.scores),
            drafted_tokens=self.drafted,
            accepted_tokens=self.accepted,
        )

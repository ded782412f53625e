"""Continuous batching over one buffer: a prompt is computed alone, in chunks, and running rows step together.

Rows that decode fill the first slots without gaps. A prompt is computed in a slot behind them; when a row ends, the
last one takes its place. Whatever joins or leaves, a row is computed as it is alone.
"""

from __future__ import annotations

import time

import numpy as np

from rk_export.runtime.engine.ahead import Drafter, Worth
from rk_export.runtime.engine.pace import Pace
from rk_export.runtime.engine.prefixes import KeptPrefixes, Match
from rk_export.runtime.engine.resume_points import ResumePoints
from rk_export.runtime.engine.rounding import GRAIN, last_run
from rk_export.runtime.engine.running import Running
from rk_export.runtime.engine.slots import SlotRunner
from rk_export.runtime.engine.state_slots import StateSlots


class SlotBatch:
    """The rows in the slots of a buffer.

    With a drafter one row runs at a time, and every token is computed in a run of at least two: attention adds up in
    another order for a single token, and an answer must not depend on what was guessed.

    Args:
        runner: Runs the graph over the slots.
        slots: Rows that run together, in the first slots; `multiple` - 1 more fill up steps, and those behind keep what
            finished rows computed.
        pace: Says how much of a prompt is computed between two steps.
        multiple: Steps run multiples of so many rows, see `row_multiple`; empty slots fill them up.
        above: The graph must be shown more positions than that in every run.
        up_to: Most positions that a row may take here; None sets no limit.
        drafter: Guesses what comes next; None guesses nothing.
    """

    def __init__(
        self,
        runner: SlotRunner,
        *,
        slots: int,
        pace: Pace,
        multiple: int = 1,
        above: int = 0,
        up_to: int | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self._runner, self._buffers = runner, runner.buffers
        self.slots, self._multiple, self._above, self._up_to = slots, multiple, above, up_to
        self._pace, self._drafter, self._worth = pace, drafter, Worth()
        self._kept = KeptPrefixes(range(slots + multiple - 1, runner.buffers.slots))
        self._rows: list[Running] = []  # the place is the slot
        self._filling: Running | None = None

    @property
    def running(self) -> int:
        """Rows that were added and have not ended."""
        return len(self._rows) + int(self._filling is not None)

    @property
    def has_room(self) -> bool:
        """Whether a slot is free and no prompt is being computed."""
        return self._filling is None and len(self._rows) < self.slots

    def add(self, running: Running) -> None:
        """Begin with the tokens of a row; what another one computed of them is copied."""
        self._filling = running
        running.slot = len(self._rows) + self._multiple - 1  # no step touches it
        running.filled = 0
        tokens, others = np.array(running.tokens, np.int64), {row.slot: row.held for row in self._rows}
        match = self._kept.best(tokens, others)
        if match is not None:
            self._buffers.copy(match.slot, running.slot, match.positions)
            running.filled = match.positions
            running.cached = min(match.positions, len(running.row.prompt))
        if (states := self._buffers.states) is not None:
            self._begin_states(states, running, match, self._kept.longest(tokens, others))

    def _begin_states(self, states: StateSlots, running: Running, match: Match | None, shared: int) -> None:
        """Put in place the states of what was copied, or of nothing."""
        if match is None or match.state is None:
            states.clear(running.slot)
        else:
            states.write(running.slot, match.state)
        running.points = ResumePoints(states, len(running.tokens), shared)
        if match is not None and match.state is not None:
            running.points.marks[match.positions] = match.state

    def drop(self, running: Running) -> None:
        """Take a row out that has not ended; one that is not in here is passed over."""
        if running is self._filling:
            self._filling = None
            self._keep(running)
        elif running in self._rows:
            self._leave(running)

    def full(self) -> list[Running]:
        """Take out and return the rows that hold as many positions as a row may take here."""
        full = [row for row in self._rows if row.filled == self._up_to]
        for running in full:
            self._leave(running)
        return full

    def step(self) -> list[Running]:
        """Give every running row a token, then compute a chunk of a prompt; return the rows that got tokens."""
        advanced = self._decode()
        for running in advanced:
            if running.ended:
                self._leave(running)
        return advanced + self._fill()

    def _fill(self) -> list[Running]:
        running = self._filling
        if running is None:
            return []
        end = self._chunk_end(running)
        tokens = np.array(running.tokens[running.filled : end], np.int64)
        with self._pace.timed_chunk(len(tokens)):
            logits = self._runner.extend(running.slot, tokens, running.filled)
        running.filled = end
        if running.points is not None:
            running.points.reached(running.slot, end)
        if end < len(running.tokens):
            return []
        running.advance(logits[-1])
        self._filling = None
        self._buffers.copy(running.slot, len(self._rows), end)
        running.slot = len(self._rows)
        self._rows.append(running)
        if running.ended:
            self._leave(running)
        return [running]

    def _chunk_end(self, running: Running) -> int:
        end, total = running.filled + self._pace.tokens(waiting=bool(self._rows)), len(running.tokens)
        if running.filled <= self._above:
            end = max(end, (self._above // GRAIN + 1) * GRAIN)
        if running.points is not None:
            end = running.points.end(max(running.filled, self._above), end)
        last = total - last_run(total)
        if end > last > max(running.filled, self._above):
            return last
        return total if running.filled >= last else min(end, total)

    def _decode(self) -> list[Running]:
        rows = list(self._rows)
        if self._drafter is not None:
            for running in rows:
                self._guess(running, self._drafter)
        elif rows:
            with self._pace.timed_step():
                self._step(rows)
        return rows

    def _step(self, rows: list[Running]) -> None:
        empty = [0] * (-len(rows) % self._multiple)  # rows that nobody reads, in slots that hold nothing
        tokens = np.array([*(running.tokens[-1] for running in rows), *empty])
        lengths = np.array([*(running.filled for running in rows), *empty])
        logits = self._runner.step(0, tokens, lengths)
        for running, scores in zip(rows, logits, strict=False):
            running.filled += 1
            running.advance(scores)

    def _guess(self, running: Running, drafter: Drafter) -> None:
        """Check guessed tokens in one run.

        Every token is chosen from the logits and in the order in which it would be chosen without guesses: a guess
        saves its run where it is the token that was chosen, and is dropped where it is not. So answers are the same,
        the sampled ones too; for one guess a position this is the acceptance by rejection of arXiv:2302.01318.
        """
        begin, before = time.perf_counter(), running.filled
        room = self._room_for_guesses(running) if self._worth.guess() else 0
        drafts = drafter.propose(running.tokens, room)
        again = 0 if drafts else 1  # the token before: its keys and values become what they are
        tokens = np.array([*running.tokens[running.filled - again :], *drafts], np.int64)
        logits = self._runner.extend(running.slot, tokens, running.filled - again, last=len(drafts) + 1)
        accepted = 0
        for scores, draft in zip(logits, [*drafts, None], strict=True):
            running.filled += 1
            running.advance(scores)
            if running.ended or running.tokens[-1] != draft:
                break
            accepted += 1
        running.drafted += len(drafts)
        running.accepted += accepted
        drafter.learn(len(drafts), accepted)
        self._worth.note(bool(drafts), time.perf_counter() - begin, running.filled - before)

    def _room_for_guesses(self, running: Running) -> int:
        left = running.row.limit - len(running.row.tokens) - 1  # the run gives one token in any case
        return left if self._up_to is None else min(left, self._up_to - running.filled - 1)

    def _leave(self, running: Running) -> None:
        """Free the slot of a row, which the last one takes."""
        self._keep(running)
        last = self._rows.pop()
        if last is running:
            return
        self._buffers.copy(last.slot, running.slot, last.filled)
        last.slot = running.slot
        self._rows[last.slot] = last

    def _keep(self, running: Running) -> None:
        held = running.held
        slot = self._kept.place(held)
        if slot is not None:
            self._buffers.copy(running.slot, slot, len(held.tokens))

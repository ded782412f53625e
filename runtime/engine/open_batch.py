"""Chooses how the rows of a session run together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from rk_export.errors import InputError
from rk_export.runtime.engine.ahead import Drafter, DraftModel, PromptLookup, check_same_tokens
from rk_export.runtime.engine.batch import Batch, OneByOne
from rk_export.runtime.engine.pace import Pace
from rk_export.runtime.engine.rounding import row_multiple
from rk_export.runtime.engine.slot_batch import SlotBatch
from rk_export.runtime.engine.slots import SlotBuffers, SlotRunner
from rk_export.runtime.engine.two_rotations import TwoRotations

if TYPE_CHECKING:
    from rk_export.runtime.engine.records import EngineOptions
    from rk_export.runtime.session import Session

logger = logging.getLogger(__name__)


def open_batch(session: Session, options: EngineOptions, draft: Session | None = None) -> tuple[Batch, int]:
    """Return a batch without rows, and the positions that each of its rows may take.

    A graph whose attention keeps no cache in place, or takes all rows for equally long, runs one row at a time.

    Args:
        session: The open bundle.
        options: How many rows, and in which memory.
        draft: A smaller model of the same vocabulary that guesses ahead, for one row at a time.

    Raises:
        InputError: The capacity is beyond the context, the memory does not hold the slots, or nothing can be guessed
            for this graph or with this draft.
    """
    capacity = options.capacity or session.max_length
    if capacity > session.max_length:
        raise InputError(
            f"{capacity} positions do not fit into a context of {session.max_length}",
            where="capacity",
            fix=f"give at most {session.max_length}",
        )
    drafter = _drafter(session, options, draft, capacity)
    if not session.takes_slots:
        if options.slots > 1:
            logger.warning(
                "%s: this graph cannot run rows of unequal length together: they run one after another",
                session.config.folder,
            )
        return OneByOne(session.decoder), capacity
    return _slot_batch(session, options, capacity, drafter), capacity


def _slot_batch(
    session: Session, options: EngineOptions, capacity: int, drafter: Drafter | None
) -> SlotBatch | TwoRotations:
    multiple, slots = (session.row_multiple, options.slots) if drafter is None else (1, 1)

    def batch(*, above: int = 0, up_to: int | None = None) -> SlotBatch:
        return SlotBatch(
            _runner(session, slots + multiple - 1 + options.kept_prefixes, min(capacity, up_to or capacity)),
            slots=slots,
            pace=Pace(options.chunk),
            multiple=multiple,
            above=above,
            up_to=up_to,
            drafter=drafter,
        )

    switch = session.config.rotary_switch
    if switch is None or capacity <= switch:
        return batch()
    return TwoRotations(batch(up_to=switch), batch(above=switch), switch)


def _drafter(
    session: Session, options: EngineOptions, draft: Session | None, capacity: int
) -> Drafter | None:
    if draft is None and not options.lookup:
        return None
    if not session.takes_slots:
        raise InputError(
            "nothing can be guessed: its graph keeps no cache in place",
            where=str(session.config.folder),
            fix="run it without guesses, or give a bundle that rk-export wrote",
        )
    _check_can_go_back(session)
    if draft is None:
        return PromptLookup()
    _check_can_go_back(draft)
    where = str(draft.config.folder)
    if options.lookup:
        raise InputError("lookup guesses already", where=where, fix="choose one of lookup and draft")
    if not draft.takes_slots:
        raise InputError(
            "its graph keeps no cache in place", where=where, fix="give a bundle that rk-export wrote"
        )
    check_same_tokens(session.text_codec.token_ids(), draft.text_codec.token_ids(), where=where)
    positions = min(capacity, draft.max_length, draft.config.rotary_switch or capacity)
    known = [rows for rows in (session.rows, draft.rows) if rows is not None]
    return DraftModel(_runner(draft, 1, positions), positions, min(known, default=None))


def _check_can_go_back(session: Session) -> None:
    if session.layout.states:
        raise InputError(
            "nothing can be guessed with it: a guess that is dropped leads back, and its layers without attention "
            "carry a state from which nothing leads back",
            where=str(session.config.folder),
            fix="run it without guesses",
        )


def measured_row_multiple(session: Session) -> int | None:
    """Return `row_multiple` of a session that takes slots."""
    positions, rows = 16, 8
    capacity = min(positions + 1, session.max_length)
    return row_multiple(_runner(session, rows, capacity), capacity - 1, session.rows or 2)


def _runner(session: Session, slots: int, capacity: int) -> SlotRunner:
    try:
        buffers = SlotBuffers(session.layout, slots=slots, capacity=capacity, device=session.device)
    except MemoryError as error:
        raise InputError(
            f"the memory does not hold {slots} slots of {capacity} positions",
            where=str(session.config.folder),
            fix="give fewer slots, or a smaller capacity",
        ) from error
    return session.slot_runner(buffers)

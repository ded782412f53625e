"""The inputs and outputs of a decoder graph, checked against the contract that the runtime can drive."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from rk_export.errors import InputError
from rk_export.runtime.bundle_config import BundleConfig

LOGITS_START = "logits_start"

_DTYPES: dict[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_STATE = re.compile(r"past_conv\.(\d+)")


@dataclass(frozen=True)
class CacheSlot:
    """One side (key or value) of one layer's cache, shape [batch, kv_heads, positions, head_size]."""

    past: str
    present: str
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class StateSlot:
    """What one layer carries from run to run in a fixed size, [batch, *shape]: each run replaces it whole.

    It is that of the last token: unlike keys and values it cannot be cut back to an earlier one.
    """

    past: str
    present: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DecoderLayout:
    """What a decoder graph takes and gives.

    Args:
        slots: Key and value of the first layer with attention, of the next one ...
        states: States of the layers without attention; empty where every layer has keys and values.
        cache_dtype: Element type of past and present.
        logits_dtype: Element type of the logits.
        position_ids: Whether the graph lists ``position_ids`` among its inputs.
        logits_start: Whether the graph can leave out the logits of all positions but the last ones.
    """

    slots: tuple[CacheSlot, ...]
    states: tuple[StateSlot, ...]
    cache_dtype: np.dtype[Any]
    logits_dtype: np.dtype[Any]
    position_ids: bool
    logits_start: bool

    @classmethod
    def of(cls, session: Any, config: BundleConfig) -> DecoderLayout:
        """Read the layout from an open session.

        Raises:
            InputError: The graph is no decoder, or has an input that the runtime does not know.
        """
        where = str(config.model_path)
        inputs = {value.name: value for value in session.get_inputs()}
        outputs = {value.name: value for value in session.get_outputs()}
        pasts = sorted((name for name in inputs if _PAST.fullmatch(name)), key=_layer_and_side)
        if not pasts or "logits" not in outputs:
            raise InputError(
                "not a decoder with past/present: needs past_key_values.* and logits",
                where=where,
                fix="open encoders with Encoder, they continue no text; export decoders with their KV cache",
            )
        states = sorted((name for name in inputs if _STATE.fullmatch(name)), key=_layer)
        unknown = inputs.keys() - {*pasts, *states, "input_ids", "attention_mask", "position_ids"}
        if unknown:
            raise InputError(
                f"unknown inputs {sorted(unknown)}", where=where, fix="export the model with rk-export"
            )
        kind = _dtype(inputs[pasts[0]], where)
        return cls(
            slots=tuple(_slot(inputs[name], outputs, config) for name in pasts),
            states=tuple(_state(inputs[name], outputs, kind, where) for name in states),
            cache_dtype=kind,
            logits_dtype=_dtype(outputs["logits"], where),
            position_ids="position_ids" in inputs,
            logits_start=LOGITS_START in {value.name for value in session.get_overridable_initializers()},
        )

    @property
    def presents(self) -> tuple[str, ...]:
        """Names of the outputs that a later call takes as its past: those of `slots`, then those of `states`."""
        return (*(slot.present for slot in self.slots), *(state.present for state in self.states))

    @property
    def pasts(self) -> tuple[str, ...]:
        """Names of the inputs of `presents`, in their order."""
        return (*(slot.past for slot in self.slots), *(state.past for state in self.states))

    def empty_past(self, batch: int) -> tuple[np.ndarray, ...]:
        """Return a cache of no positions: [batch, kv_heads, 0, head_size] per slot, then zeros for each state."""
        empty = [np.zeros((batch, s.kv_heads, 0, s.head_size), self.cache_dtype) for s in self.slots]
        return (*empty, *(np.zeros((batch, *state.shape), self.cache_dtype) for state in self.states))


def _layer(name: str) -> int:
    match = _STATE.fullmatch(name)
    return int(match[1]) if match else -1


def _state(past: Any, outputs: dict[str, Any], kind: np.dtype[Any], where: str) -> StateSlot:
    present = past.name.replace("past", "present", 1)
    shape = past.shape[1:]
    if present not in outputs or not all(isinstance(size, int) for size in shape):
        raise InputError(
            f"{past.name} has no output {present} or no fixed size", where=where, fix="export the model again"
        )
    if _dtype(past, where) != kind:
        raise InputError(
            f"{past.name} has another type than the keys and values",
            where=where,
            fix="export the model again",
        )
    return StateSlot(past.name, present, tuple(int(size) for size in shape))


def _layer_and_side(name: str) -> tuple[int, str]:
    match = _PAST.fullmatch(name)
    return (int(match[1]), match[2]) if match else (-1, "")


def _slot(past: Any, outputs: dict[str, Any], config: BundleConfig) -> CacheSlot:
    present = past.name.replace("past_key_values", "present")
    if present not in outputs:
        raise InputError(f"no output {present}", where=str(config.model_path), fix="export the model again")
    shapes = [past.shape, outputs[present].shape]
    return CacheSlot(
        past=past.name,
        present=present,
        kv_heads=_static(shapes, 1, config.kv_heads, past.name),
        head_size=_static(shapes, 3, config.head_size, past.name),
    )


def _static(shapes: list[list[Any]], axis: int, otherwise: int | None, name: str) -> int:
    """Return a dimension that a graph may leave symbolic (GenAI's builder does) and the config then tells."""
    for shape in shapes:
        if len(shape) == 4 and isinstance(shape[axis], int):
            return int(shape[axis])
    if otherwise is None:
        raise InputError(
            f"dimension {axis} of the cache is unknown", where=name, fix="put config.json beside the graph"
        )
    return otherwise


def _dtype(value: Any, where: str) -> np.dtype[Any]:
    if value.type not in _DTYPES:
        raise InputError(
            f"{value.name} is {value.type}; only float and float16 can be run",
            where=where,
            fix="export the bundle in fp32 or fp16",
        )
    return _DTYPES[value.type]

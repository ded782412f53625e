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


@dataclass(frozen=True)
class CacheSlot:
    """One side (key or value) of one layer's cache, shape [batch, kv_heads, positions, head_size]."""

    past: str
    present: str
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class DecoderLayout:
    """What a decoder graph takes and gives.

    Args:
        slots: Key and value of layer 0, of layer 1 ...
        cache_dtype: Element type of past and present.
        logits_dtype: Element type of the logits.
        position_ids: Whether the graph lists ``position_ids`` among its inputs.
        logits_start: Whether the graph can leave out the logits of all positions but the last ones.
    """

    slots: tuple[CacheSlot, ...]
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
                fix="open encoders with EncoderSession; export decoders with their KV cache",
            )
        unknown = inputs.keys() - set(pasts) - {"input_ids", "attention_mask", "position_ids"}
        if unknown:
            raise InputError(
                f"unknown inputs {sorted(unknown)}", where=where, fix="export the model with rk-export"
            )
        return cls(
            slots=tuple(_slot(inputs[name], outputs, config) for name in pasts),
            cache_dtype=_dtype(inputs[pasts[0]], where),
            logits_dtype=_dtype(outputs["logits"], where),
            position_ids="position_ids" in inputs,
            logits_start=LOGITS_START in {value.name for value in session.get_overridable_initializers()},
        )

    def empty_past(self, batch: int) -> tuple[np.ndarray, ...]:
        """Return a cache of no positions, one array [batch, kv_heads, 0, head_size] per slot."""
        return tuple(np.zeros((batch, s.kv_heads, 0, s.head_size), self.cache_dtype) for s in self.slots)


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

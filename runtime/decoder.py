"""Runs a decoder graph token by token: one prefill, then one step for each new token of the batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from rk_export.errors import InputError
from rk_export.runtime.cache import Cache
from rk_export.runtime.layout import LOGITS_START, DecoderLayout
from rk_export.runtime.rotation import check_rotation
from rk_export.runtime.token_gate import TokenGate


class Decoder:
    """The state of one batch: bound buffers, cache, attention mask.

    A step costs two small rebinds (tokens and mask) around the run; everything else stays bound.

    Args:
        session: An open ``onnxruntime.InferenceSession``.
        layout: Its inputs and outputs.
        cache: Shared or growing; used by this decoder alone.
        capacity: Most positions, prompt and new tokens together.
        switch: Longest sequence under LongRoPE's short factors. The step past it runs all tokens again, as Hugging
            Face ``generate`` does: the keys in the cache have the short rotation. None where there is no switch.
        rows: Rows of the embedding; None where nothing tells.
    """

    def __init__(
        self,
        session: Any,
        layout: DecoderLayout,
        cache: Cache,
        *,
        capacity: int,
        switch: int | None = None,
        rows: int | None = None,
    ) -> None:
        self._session, self._layout, self._cache, self._capacity = session, layout, cache, capacity
        self._switch, self._gate = switch, TokenGate(rows)
        self._tokens = np.empty((1, 0), np.int64)  # as far as the switch
        self._binding = session.io_binding()
        self._mask = np.ones((1, capacity), np.int64)
        self._length = 0
        self._logits: np.ndarray | None = None
        cache.bind(self._binding)
        if layout.logits_start:
            # bind_cpu_input knows required inputs only; this one has a default.
            last = ort.OrtValue.ortvalue_from_numpy(np.array([-1], np.int64))
            self._binding.bind_ortvalue_input(LOGITS_START, last)

    def prefill(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None) -> np.ndarray:
        """Run the prompts.

        Args:
            input_ids: [batch, length], padded on the left.
            attention_mask: [batch, length], 0 at padding; None where there is none.

        Returns:
            Logits of the last position, [batch, vocabulary], float32.

        Raises:
            InputError: A token has no row, the prompts are longer than the capacity, or LongRoPE rotates them
                differently.
        """
        self._gate.check(input_ids)
        batch, length = input_ids.shape
        self._reserve(length)
        self._mask = np.ones((batch, self._capacity), np.int64)
        if attention_mask is not None:
            self._mask[:, :length] = attention_mask
        check_rotation(self._mask[:, :length], 0, self._switch)
        if self._switch is not None and length <= self._switch:
            self._tokens = np.array(input_ids, np.int64)
        # ONNX Runtime's arena keeps the memory of this large output for the next prefill.
        self._binding.bind_output("logits", "cpu")
        self._run(np.ascontiguousarray(input_ids, np.int64))
        last = np.array(
            self._binding.get_outputs()[-1].numpy()[:, -1]
        )  # the cache was bound before the logits
        self._logits = np.empty((batch, 1, last.shape[-1]), self._layout.logits_dtype)
        self._binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(self._logits))
        return last.astype(np.float32, copy=False)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token to every row.

        Args:
            tokens: [batch].

        Returns:
            Logits [batch, vocabulary], float32; valid until the next step.

        Raises:
            InputError: A token has no row, the capacity is used up, or nothing was prefilled.
        """
        self._gate.check(tokens, where="tokens")
        if self._logits is None:
            raise InputError("step before prefill", where="Decoder", fix="call prefill first")
        if self._switch is not None and self._length <= self._switch:
            self._tokens = np.column_stack([self._tokens, tokens])
            if self._length == self._switch:
                return self._start_anew()
        self._reserve(1)
        self._run(tokens.astype(np.int64).reshape(-1, 1))
        return self._logits[:, 0].astype(np.float32, copy=False)

    def _start_anew(self) -> np.ndarray:
        mask = np.column_stack([self._mask[:, : self._length], np.ones(len(self._mask), np.int64)])
        self._length = 0
        self._cache.bind(self._binding)
        return self.prefill(self._tokens, mask)

    def _reserve(self, count: int) -> None:
        if self._length + count > self._capacity:
            raise InputError(
                f"{self._length + count} positions do not fit into {self._capacity}",
                where="KV cache",
                fix="shorten the prompt, or make the decoder with a larger capacity",
            )
        self._length += count

    def _run(self, input_ids: np.ndarray) -> None:
        binding = self._binding
        mask = np.ascontiguousarray(self._mask[:, : self._length])
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("attention_mask", mask)
        if self._layout.position_ids:
            positions = position_ids(mask)[:, -input_ids.shape[1] :]
            binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions))
        self._session.run_with_iobinding(binding)
        self._cache.advance(binding)


def position_ids(attention_mask: np.ndarray) -> np.ndarray:
    """Return [batch, length] positions, counted from the first token that is not padding."""
    positions: np.ndarray = np.maximum(attention_mask.cumsum(axis=1) - 1, 0)
    return positions

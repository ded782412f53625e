"""Calibration text of a model that is too large to write it itself: an INT4 version of it does, in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor

from rk_export.bundle.write import write_configs
from rk_export.calibration.self_text import draw
from rk_export.graph.build import build_graph, save_graph
from rk_export.options.calibration import UNWEIGHED
from rk_export.options.quantize import TABLES, Quantize
from rk_export.options.recipe import Recipe
from rk_export.planning.planner import decide_plan
from rk_export.progress import Bar, stage
from rk_export.rewrite.apply import rewrite
from rk_export.runtime import Session
from rk_export.runtime.layout import DecoderLayout
from rk_export.source.protocol import Source

# Every matrix in 4 bits, the tables in 8, rounded to nearest: what can be had in one pass over the files.
_PLAIN = Recipe(
    (
        Quantize(bits=4, block=32, quantizer="rtn"),
        Quantize(targets=TABLES, bits=8, block=32, quantizer="rtn"),
    ),
    calibration=UNWEIGHED,
)
_SEQUENCES = 64  # written together
# Bytes of keys and values of the sequences that are written together: at least, and as a share of the INT4 model.
_CACHE_BYTES, _CACHE_SHARE = 1 << 29, 0.5


def int4_text(source: Source, uniforms: Tensor, start: int, ends: list[int]) -> Tensor:
    """Return text that a model in INT4 writes, a token for each random number; arguments as in `sample_text`.

    Args:
        source: The dense model; it is read a layer at a time.
        uniforms: float32 (sequences, length), in [0, 1).
        start: First token of each sequence, and the one after an end-of-sequence token.
        ends: The end-of-sequence tokens.

    Returns:
        int64 (sequences, length).

    Raises:
        InputError: If logits are not finite.
    """
    with TemporaryDirectory(prefix="rk-export-text-") as place:
        folder = Path(place)
        rewritten = rewrite(source, decide_plan(source, _PLAIN))
        graph, _ = build_graph(rewritten)
        save_graph(graph, folder)
        write_configs(folder, rewritten, source.folder, source.origin[1])
        del graph, rewritten
        size = sum(path.stat().st_size for path in folder.iterdir())
        session = Session.from_pretrained(folder, provider="cpu", threads=torch.get_num_threads())
        row = _cache_bytes(session.layout, uniforms.shape[1])
        together = max(1, min(_SEQUENCES, max(_CACHE_BYTES, int(_CACHE_SHARE * size)) // row))
        with stage("writing text in INT4, tokens", uniforms.numel()) as bar:
            batches = torch.split(uniforms, together)
            return torch.cat([_batch(session, batch, start, ends, bar) for batch in batches])


def _cache_bytes(layout: DecoderLayout, length: int) -> int:
    """Return the bytes of keys and values of one sequence."""
    width = sum(slot.kv_heads * slot.head_size for slot in layout.slots)
    return 2 * width * length * layout.cache_dtype.itemsize


def _batch(session: Session, uniforms: Tensor, start: int, ends: list[int], bar: Bar) -> Tensor:
    sequences, length = uniforms.shape
    decoder = session.decoder(batch=sequences, capacity=length)
    tokens = np.full((sequences, length), start, np.int64)
    for position in range(1, length):
        last = tokens[:, position - 1]
        logits = decoder.prefill(last[:, None]) if position == 1 else decoder.step(last)
        drawn = draw(torch.from_numpy(logits), uniforms[:, position]).numpy()
        tokens[:, position] = np.where(np.isin(last, ends), start, drawn)
        bar.advance(sequences)
    bar.advance(sequences)  # the first token of each
    return torch.from_numpy(tokens)

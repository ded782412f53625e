"""GGUF files: whole, quantized, in shards, damaged, of architectures that are not read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_files import Q8_0, finish, model_for_gguf, write_gguf
from transformers import PreTrainedModel

from input_cases.case import Build, Case, Given

GEMMA3 = {"layer_types": None, "num_hidden_layers": 7, "query_pre_attn_scalar": 32}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def written(family: str, change: Callable[[Path], object] = lambda path: None, **fields: Any) -> Build:
    """Return what writes a tiny model as a GGUF file in floats, and changes the file."""

    def build(folder: Path) -> Given:
        path = write_gguf(folder / "tiny.gguf", model_for_gguf(family, **fields))
        change(path)
        return Given(path, lambda: model_for_gguf(family, **fields))

    return build


def rounded(folder: Path) -> Given:
    """A file whose matrices are stored as Q8_0, and the model with the values that they stand for."""

    def reference() -> PreTrainedModel:
        model = model_for_gguf("llama")
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    values = gguf.dequantize(gguf.quantize(parameter.numpy(), Q8_0), Q8_0)
                    parameter.copy_(torch.from_numpy(values))
        return model

    return Given(write_gguf(folder / "tiny.gguf", model_for_gguf("llama"), quantize=True), reference)


def shards(lost: int | None = None) -> Build:
    """Return what writes a model in three files, names the second, and loses one."""

    def build(folder: Path) -> Given:
        write_gguf(folder / "tiny.gguf", model_for_gguf("llama"), split_max_tensors=8)
        paths = sorted(folder.glob("tiny-*-of-*.gguf"))
        if lost is not None:
            paths[lost].unlink()
        return Given(paths[1], lambda: model_for_gguf("llama"))

    return build


def header(architecture: str, kind: str = "model") -> Build:
    """Return what writes a file of some architecture with one tensor."""

    def build(folder: Path) -> Given:
        path = folder / "other.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_type(kind)
        writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
        finish(writer)
        return Given(path)

    return build


def lacking(name: str) -> Build:
    """Return what writes a file without one tensor."""
    return lambda folder: Given(write_gguf(folder / "tiny.gguf", model_for_gguf("llama"), without=name))


def unknown_rule(folder: Path) -> Given:
    """A file whose tokenizer cuts text by a rule that is not known."""
    return Given(write_gguf(folder / "tiny.gguf", model_for_gguf("llama"), rule="unheard-of"))


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pointer(path: Path) -> None:
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 99\n")


CASES = (
    Case("GGUF, Llama", "a Llama in floats", "read", written("llama")),
    Case(
        "GGUF, Gemma 3", "a Gemma 3 with windows, norms stored plus one", "read", written("gemma3", **GEMMA3)
    ),
    Case("GGUF, experts", "a Qwen3-MoE with stacked experts", "read", written("qwen3_moe")),
    Case("GGUF, YaRN", "a Qwen2 with YaRN", "read", written("qwen2", rope_parameters=YARN)),
    Case("GGUF, Q8_0", "a Llama whose matrices are stored as Q8_0", "dequantized", rounded),
    Case("GGUF, shards", "the second of three shards", "read", shards()),
    Case(
        "GGUF, shard missing", "the second of three shards, the third is missing", "refused", shards(lost=2)
    ),
    Case("GGUF, unknown architecture", "general.architecture is rwkv6", "refused", header("rwkv6")),
    Case("GGUF, image encoder", "an mmproj file", "refused", header("clip", "mmproj")),
    Case("GGUF, adapter", "an adapter of a Llama", "refused", header("llama", "adapter")),
    Case("GGUF, missing tensor", "one projection is missing", "refused", lacking("blk.1.attn_output.weight")),
    Case("GGUF, unknown rule", "tokenizer.ggml.pre has an unknown name", "refused", unknown_rule),
    Case("GGUF, truncated", "half of a file", "refused", written("llama", halve)),
    Case("GGUF, pointer", "the file is a Git LFS pointer", "refused", written("llama", pointer)),
)

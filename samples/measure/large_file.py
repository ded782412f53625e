"""A bundle whose external data is larger than 4 GB: written, verified and run.

    python samples/measure/large_file.py WORK [--layers 6]

Writes a random Llama in bfloat16 into the folder WORK, exports it in floats, checks the size of its data file and
generates from it. It is in no gate: six layers take 12 GB of disk, and ONNX Runtime holds the matrices in memory.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import rk_export
from rk_export.model.families import empty_model

LARGEST_OF_32_BITS = 1 << 32
_TENSORS_OF_LAYER = 9


def write_model(folder: Path, layers: int) -> Path:
    """Write a random Llama of LLaMA-7B's width and a small vocabulary, one file a layer, tensor by tensor."""
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=512,
        architectures=["LlamaForCausalLM"],
        eos_token_id=2,
    )
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    generator, places = torch.Generator().manual_seed(0), {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in empty_model(config).named_parameters():
        part = name.split(".")[2] if ".layers." in name else "outer"
        file = places[name] = f"part-{part}.safetensors"
        noise = torch.empty(parameter.shape, dtype=torch.bfloat16)
        values = torch.ones_like(noise) if noise.ndim == 1 else noise.normal_(0, 0.02, generator=generator)
        shards.setdefault(file, {})[name] = values
        if part != "outer" and len(shards[file]) == _TENSORS_OF_LAYER:
            save_file(shards.pop(file), folder / file, metadata={"format": "pt"})
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the model, export it, and say how large its file is and what it generates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=6)
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    model = given.work / "model"
    if not model.exists():
        write_model(model, given.layers)
    bundle = given.work / "bundle"
    report = rk_export.export(model, bundle, force=True)
    for tier in report.parity:
        sys.stdout.write(f"tier {tier.tier}: {tier.relative_error} passed {tier.passed}\n")
    size = (bundle / "model.onnx.data").stat().st_size
    session = rk_export.Session.from_pretrained(bundle, provider="cpu")
    options = rk_export.GenerationOptions(max_new_tokens=8)
    (row,) = session.generate([3, 4, 5], options=options)
    sys.stdout.write(
        f"data file {size:,} bytes, generated {row.token_ids}, {time.perf_counter() - start:.0f} s\n"
    )
    return 0 if size > LARGEST_OF_32_BITS else 1


if __name__ == "__main__":
    sys.exit(main())

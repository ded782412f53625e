"""Hugging Face folders with the shapes of real models and random weights: what a model costs depends on its shape.

    python samples/measure/shapes.py 0.5b /tmp/shape05               Qwen2.5-0.5B's shape, 1 GB
    python samples/measure/shapes.py 7b /tmp/shape7 --layers 4       LLaMA-7B's shape with four layers

Weights are bfloat16 in one safetensors file a layer, so that no more than one layer is ever in memory. Each tensor is
drawn from its name and the seed: a model with fewer layers is the beginning of one with more. The tokenizer is that of
SmolLM2; a smaller vocabulary takes its first tokens.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a script

import assets
from measure import harness

from rk_export import InputError

# Sizes as the models' own configs give them; the mixture is small on purpose.
SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "tie_word_embeddings": True,
    },
    "0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
    },
    "1.1b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
    "mixture": {
        "model_type": "qwen3_moe",
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "head_dim": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    },
}
SPREAD = {"weight": 0.02, "norm": 0.05}  # standard deviations; gains of norms are around one
TOKENIZER = ("tokenizer_config.json", "chat_template.jinja")
Shapes = dict[str, tuple[int, ...]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="another depth (default the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default %(default)s)")
    return harness.run(script, parser.parse_args(arguments))


def script(args: argparse.Namespace) -> None:
    """Write the folder and say what it holds."""
    parameters = write(args.folder, args.shape, layers=args.layers, seed=args.seed)
    harness.logger.info("%s: %.1f million stored parameters, bfloat16", args.folder, parameters / 1e6)


def write(
    folder: Path, shape: str, *, layers: int | None = None, seed: int = 0, tokenizer: Path | None = None
) -> int:
    """Write a folder of one of the shapes and return how many parameters it stores.

    Args:
        folder: A new or an empty folder.
        shape: One of `SHAPES`.
        layers: The depth; None takes the model's own.
        seed: Of the weights.
        tokenizer: The folder that has the tokenizer; None takes SmolLM2's, which is fetched.

    Raises:
        InputError: The folder holds something, or the depth is not positive.
    """
    if layers is not None and layers < 1:
        raise InputError("a model has at least one layer", where="--layers", fix="give 1 or more")
    if folder.exists() and any(folder.iterdir()):
        raise InputError("the folder is not empty", where=str(folder), fix="give another, or delete it")
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(shape, layers)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    write_tokenizer(folder, tokenizer or assets.smollm2(), config.vocab_size)
    return write_weights(folder, config, seed)


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    """Return the config of a shape; its special tokens are those of SmolLM2."""
    fields = dict(SHAPES[shape])
    if layers is not None:
        fields["num_hidden_layers"] = layers
    config = AutoConfig.for_model(**fields, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3_moe": "Qwen3Moe"}[config.model_type]
    config.architectures, config.dtype = [f"{name}ForCausalLM"], torch.bfloat16
    return config


def write_tokenizer(folder: Path, source: Path, size: int) -> None:
    """Copy a BPE tokenizer whose tokens are numbered in the order of its merges, at most the first `size` tokens."""
    for name in TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    model = tokenizer["model"]
    kept = {token: number for token, number in model["vocab"].items() if number < size}
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    model["merges"] = [pair for pair in pairs if {*pair, "".join(pair)} <= kept.keys()]
    model["vocab"] = kept
    text = json.dumps(tokenizer, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")


def write_weights(folder: Path, config: PretrainedConfig, seed: int) -> int:
    """Write one file a layer and the index of all; return the number of parameters."""
    files = list(files_of(config))
    index: dict[str, str] = {}
    parameters = 0
    for number, shapes in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        parameters += write_file(folder / name, shapes, seed)
        index |= dict.fromkeys(shapes, name)
    found = {"metadata": {"total_size": 2 * parameters}, "weight_map": index}
    text = json.dumps(found, indent=1)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return parameters


def write_file(path: Path, shapes: Shapes, seed: int) -> int:
    """Write the tensors of one file and return the number of parameters."""
    tensors = {name: random_tensor(name, shape, seed) for name, shape in shapes.items()}
    save_file(tensors, path, {"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def random_tensor(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the bfloat16 tensor that belongs to a name and a seed: a gain around one, or numbers around zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    is_gain = name.endswith("norm.weight")
    spread, mean = (SPREAD["norm"], 1.0) if is_gain else (SPREAD["weight"], 0.0)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(mean, spread, generator=generator)


def files_of(config: PretrainedConfig) -> Iterator[Shapes]:
    """Yield names and shapes of the tensors, file by file: the embedding, each layer, what follows the layers."""
    table = (config.vocab_size, config.hidden_size)
    yield {"model.embed_tokens.weight": table}
    for number in range(config.num_hidden_layers):
        prefix = f"model.layers.{number}."
        yield {f"{prefix}{name}": shape for name, shape in layer_shapes(config).items()}
    head = {} if config.tie_word_embeddings else {"lm_head.weight": table}
    yield {"model.norm.weight": (config.hidden_size,), **head}


def layer_shapes(config: PretrainedConfig) -> Shapes:
    """Return names and shapes of one layer's tensors."""
    norms = ("input_layernorm.weight", "post_attention_layernorm.weight")
    return {
        **dict.fromkeys(norms, (config.hidden_size,)),
        **_attention(config),
        **_feed_forward(config),
    }


def _attention(config: PretrainedConfig) -> Shapes:
    width = config.hidden_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    inward = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    shapes: Shapes = {f"self_attn.{name}.weight": (rows, width) for name, rows in inward.items()}
    shapes["self_attn.o_proj.weight"] = (width, queries)
    if config.model_type == "qwen2":
        shapes |= {f"self_attn.{name}.bias": (rows,) for name, rows in inward.items()}
    if config.model_type == "qwen3_moe":
        shapes |= {f"self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
    return shapes


def _feed_forward(config: PretrainedConfig) -> Shapes:
    width = config.hidden_size
    if config.model_type != "qwen3_moe":
        return _gated("mlp.", width, config.intermediate_size)
    shapes: Shapes = {"mlp.gate.weight": (config.num_experts, width)}
    for expert in range(config.num_experts):
        shapes |= _gated(f"mlp.experts.{expert}.", width, config.moe_intermediate_size)
    return shapes


def _gated(prefix: str, width: int, inner: int) -> Shapes:
    up = {f"{prefix}{name}.weight": (inner, width) for name in ("gate_proj", "up_proj")}
    return {**up, f"{prefix}down_proj.weight": (width, inner)}


if __name__ == "__main__":
    sys.exit(main())

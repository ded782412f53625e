"""What is damaged and who reads it: for each kind of file a few valid ones, and the functions that users reach."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from gguf_files import model_for_gguf, write_gguf
from onnx.external_data_helper import set_external_data
from runtime_models import TinyDecoder
from tiny_models import tiny_model
from tokenizers import Tokenizer, models

from fuzz_cases.mutations import (
    Draw,
    Hostile,
    damaged_binary,
    damaged_bytes,
    damaged_json,
    damaged_yaml,
)
from rk_export import Plan, Recipe, Run, make_plan, open_source
from rk_export.commands.verify import bundle_files
from rk_export.json_codec import to_json
from rk_export.manifest import MANIFEST, write_manifest
from rk_export.model.description import ModelDescription
from rk_export.parity.greedy import Golden
from rk_export.parity.probe import make_probe
from rk_export.planning.planner import check_sites
from rk_export.recipes import presets
from rk_export.runtime import Session
from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.contestants import genai_settings
from rk_export.runtime.text import TextCodec
from rk_export.source.gguf.convert import gguf_to_folder
from rk_export.source.tensor_files import SafetensorFiles
from rk_export.source.tokenizer_conversion import check_tokenizer
from rk_export.source.tokenizer_files import copy_tokenizer
from rk_export.source.weight_files import INDEX_FILE, open_tensors

Case = Callable[[], object]
FAMILIES = ("llama", "qwen3", "gemma3", "phi3", "mixtral", "gpt2", "bert")


@dataclass(frozen=True)
class Place:
    """Where the cases of a kind lie.

    Args:
        folder: What a case may read and write.
        outside: Files that it must not open, by absolute and relative paths.
    """

    folder: Path
    outside: Sequence[str]

    @property
    def hostile(self) -> Hostile:
        return Hostile(self.outside)

    def made(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir(parents=True, exist_ok=True)
        return path


# Makes the valid files of a kind once, and returns what makes a case from a generator.
Kind = Callable[[Place], Callable[[Draw], Case]]


def config(place: Place) -> Callable[[Draw], Case]:
    """``config.json`` of seven families, opened as a model."""
    folders = {family: _model(place, family) for family in FAMILIES}
    stated = {family: json.loads((path / "config.json").read_text()) for family, path in folders.items()}
    hostile = place.hostile

    def case(draw: Draw) -> Case:
        family = draw.choice(FAMILIES)
        data = damaged_json(stated[family], hostile, draw, _CONFIG_NAMES)
        (folders[family] / "config.json").write_bytes(data)
        return lambda: open_source(folders[family]).structure()

    return case


def safetensors_header(place: Place) -> Callable[[Draw], Case]:
    """The header of a safetensors file: its length, its JSON, and the data behind it; every tensor is read."""
    from safetensors.torch import save_file

    path = place.made("weights") / "model.safetensors"
    tensors = {
        "model.a": torch.randn(8, 16),
        "model.b": torch.randn(4, dtype=torch.float32).to(torch.bfloat16),
        "model.c": torch.arange(10, dtype=torch.int8),
    }
    save_file(tensors, path, {"format": "pt"})
    valid = path.read_bytes()
    length = int.from_bytes(valid[:8], "little")
    header, behind = json.loads(valid[8 : 8 + length]), valid[8 + length :]
    hostile = place.hostile

    def changed(draw: Draw) -> bytes:
        if draw.random() < 0.3:
            return damaged_binary(valid, [0, 0, 4, 8], draw)
        text = damaged_json(header, hostile, draw, ("dtype", "shape", "data_offsets", "__metadata__"))
        text += b" " * (-len(text) % 8)
        stated = (
            len(text)
            if draw.random() < 0.9
            else draw.choice((0, 1, len(text) + 8, 1 << 32, 1 << 63, 99_999_999))
        )
        data = behind if draw.random() < 0.9 else damaged_bytes(behind, draw)
        return stated.to_bytes(8, "little") + text + data

    def read() -> None:
        opened = SafetensorFiles([path])
        for name in opened.shapes:
            opened.read(name)

    def case(draw: Draw) -> Case:
        path.write_bytes(changed(draw))
        return read

    return case


def safetensors_index(place: Place) -> Callable[[Draw], Case]:
    """``model.safetensors.index.json`` of two shards."""
    from safetensors.torch import save_file

    folder = place.made("shards")
    shards = {f"model-0000{number}-of-00002.safetensors": {f"t{number}": torch.randn(4)} for number in (1, 2)}
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    valid = {
        "metadata": {"total_size": 32},
        "weight_map": {tensor: name for name, tensors in shards.items() for tensor in tensors},
    }
    hostile = place.hostile

    def case(draw: Draw) -> Case:
        (folder / INDEX_FILE).write_bytes(damaged_json(valid, hostile, draw, ("weight_map", "t3")))
        return lambda: open_tensors(folder)

    return case


def gguf(place: Place) -> Callable[[Draw], Case]:
    """GGUF files of three families, converted to a folder."""
    folder = place.made("gguf")
    valid = []
    for family, quantized in (("llama", True), ("qwen3", False), ("gemma2", False)):
        path = folder / f"{family}.gguf"
        write_gguf(path, model_for_gguf(family), quantize=quantized)
        valid.append((path.read_bytes(), _gguf_numbers(path)))
    path = folder / "case.gguf"

    def case(draw: Draw) -> Case:
        data, numbers = draw.choice(valid)
        path.write_bytes(damaged_binary(data, numbers, draw))
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        return lambda: gguf_to_folder(path, cache)

    return case


def _gguf_numbers(path: Path) -> list[int]:
    """Return where the header of a GGUF file has counts, lengths, kinds and offsets; the first ones count more."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    fields = [field.offset for field in reader.fields.values() if field.offset]
    parts = [field.offset + 8 + len(field.name) for field in reader.fields.values() if field.offset]
    values = [place + step for place in parts for step in (0, 4, 8)]
    tensors = [
        int(tensor.field.offset) + step
        for tensor in reader.tensors
        for step in (
            0,
            8 + len(tensor.name),
            12 + len(tensor.name),
            20 + len(tensor.name),
            28 + len(tensor.name),
        )
    ]
    return [*[4, 8, 16] * 20, *fields, *values, *tensors]


def recipe(place: Place) -> Callable[[Draw], Case]:
    """Recipe files, made from all presets."""
    path = place.made("recipes") / "recipe.yaml"
    texts = [preset.text for preset in presets().values()]
    (path.parent / "text.txt").write_text("words\n")
    texts.append("calibration: {text: text.txt, tokens: 512}\nsteps: []\n")
    texts.append(
        "target: {ep: cpu}\nsteps:\n  - factorize: {groups: [qk], keep: 0.5}\n  - quantize: {bits: 4}\n"
    )
    hostile = Hostile([one for one in place.outside if not one.endswith(".txt")])

    def case(draw: Draw) -> Case:
        path.write_bytes(damaged_yaml(draw.choice(texts), hostile, draw))
        return lambda: Recipe.load(path)

    return case


def plan(place: Place) -> Callable[[Draw], Case]:
    """``plan.json``, held against the model it was made for."""
    source = open_source(_model(place, "llama"))
    path = place.made("plans") / "plan.json"
    names = ("floats", "int4", "pruned", "w8a8")
    plans = [make_plan(source.folder, Recipe.load(name), run=Run(threads=1)).to_json() for name in names]
    hostile, description = place.hostile, source.description

    def case(draw: Draw) -> Case:
        path.write_bytes(damaged_json(draw.choice(plans), hostile, draw, _PLAN_NAMES))
        return lambda: _checked(description, path)

    return case


def _checked(description: ModelDescription, path: Path) -> None:
    check_sites(description, Plan.load(path))


def manifest(place: Place) -> Callable[[Draw], Case]:
    """``rk_manifest.json`` of a bundle, and links in the place of its files."""
    folder = _bundle(place)
    valid = json.loads((folder / MANIFEST).read_text())
    hostile = place.hostile

    def case(draw: Draw) -> Case:
        (folder / MANIFEST).write_bytes(
            damaged_json(valid, hostile, draw, ("files", "golden", "../x", "/x", "ep"))
        )
        restore = _misplaced(folder / "model.onnx.data", place, draw) if draw.random() < 0.2 else None

        def read() -> None:
            try:
                bundle_files(folder)
                BundleConfig.read(folder)
            finally:
                if restore is not None:
                    restore()

        return read

    return case


def genai_config(place: Place) -> Callable[[Draw], Case]:
    """``genai_config.json``, read by the runtime and before GenAI gets it."""
    folder = _bundle(place)
    path = folder / "genai_config.json"
    hostile = place.hostile

    def case(draw: Draw) -> Case:
        path.write_bytes(damaged_json(_GENAI, hostile, draw, _GENAI_NAMES))

        def read() -> None:
            BundleConfig.read(folder).ends  # noqa: B018 (read when it is asked for)
            genai_settings(folder)

        return read

    return case


def external_data(place: Place) -> Callable[[Draw], Case]:
    """Places of external tensors in ``model.onnx``, and what lies there; the bundle is opened and runs."""
    folder = _bundle(place)
    path = folder / "model.onnx"
    valid = path.read_bytes()
    ids = np.arange(1, 5)[None]
    hostile = place.hostile

    def changed(draw: Draw) -> bytes:
        proto = onnx.load_from_string(valid)
        for _ in range(draw.choice((1, 1, 2, 3))):
            tensor = draw.choice(list(proto.graph.initializer))
            if draw.random() < 0.2:
                tensor.raw_data = b""
                set_external_data(tensor, str(hostile.scalar(draw)).encode(errors="replace").decode())
                tensor.ClearField("raw_data")
            if not tensor.external_data:
                continue
            entry = draw.choice(list(tensor.external_data))
            kind = draw.random()
            if kind < 0.4:
                entry.value = draw.choice(hostile.paths)
            elif kind < 0.7:
                entry.value = str(hostile.scalar(draw)).encode(errors="replace").decode().replace("\0", "")
            elif kind < 0.8:
                entry.key = draw.choice(("location", "offset", "length", "checksum", "basepath"))
            elif kind < 0.9:
                tensor.dims[:] = [*tensor.dims[1:], draw.choice((0, -1, 1, 1 << 40, 1 << 62))]
            else:
                tensor.external_data.remove(entry)
        return bytes(proto.SerializeToString())

    def case(draw: Draw) -> Case:
        kind = draw.random()
        path.write_bytes(changed(draw) if kind < 0.8 else valid)
        restore = _misplaced(folder / "model.onnx.data", place, draw) if kind > 0.7 else None

        def read() -> None:
            try:
                Session.from_pretrained(folder, provider="cpu", threads=1).prefill_logits(ids)
            finally:
                if restore is not None:
                    restore()

        return read

    return case


def _misplaced(path: Path, place: Place, draw: Draw) -> Callable[[], None]:
    """Put a link, a pipe or a cut file in the place of a file; return what undoes it."""
    kept = path.with_name("kept")
    path.rename(kept)
    kind = draw.randrange(6)
    if kind == 0:
        path.symlink_to(draw.choice(place.outside))
    elif kind == 1:
        path.symlink_to(path.name)  # to itself
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.write_bytes(kept.read_bytes()[: draw.randrange(kept.stat().st_size)])
    elif kind == 4:
        path.mkdir()

    def restore() -> None:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        kept.rename(path)

    return restore


def tokenizer(place: Place) -> Callable[[Draw], Case]:
    """Tokenizer files: opened, a text encoded and decoded, ends and special tokens found, copied into a bundle."""
    folder = _bundle(place)
    copied = place.made("copied")
    valid = {
        name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")
    }
    valid["special_tokens_map.json"] = {"eos_token": "<eos>", "additional_special_tokens": ["<x>"]}
    valid["added_tokens.json"] = {"<bos>": 256, "<eos>": 257}
    valid["vocab.json"], merges = {"a": 0, "b": 1, "ab": 2}, "#version: 0.2\na b\n"
    others = [json.loads(Tokenizer(model).to_str()) for model in _OTHER_MODELS]
    hostile = place.hostile

    def case(draw: Draw) -> Case:
        name = draw.choice(("tokenizer.json", "tokenizer.json", "tokenizer.json", *valid))
        for file, document in valid.items():
            if file == name:
                data = draw.choice((document, document, *others)) if name == "tokenizer.json" else document
                (folder / file).write_bytes(damaged_json(data, hostile, draw, _TOKENIZER_NAMES))
            elif file in ("tokenizer.json", "tokenizer_config.json") or draw.random() < 0.3:
                (folder / file).write_text(json.dumps(document))
            else:
                (folder / file).unlink(missing_ok=True)
        (folder / "merges.txt").write_bytes(damaged_bytes(merges.encode(), draw))
        shutil.rmtree(copied, ignore_errors=True)
        copied.mkdir()
        whole = draw.random() < 0.1
        if whole and draw.random() < 0.3:
            (folder / "tokenizer.json").unlink()

        def read() -> None:
            if whole:
                check_tokenizer(folder, 258)
                copy_tokenizer(folder, copied)
                return
            BundleConfig.read(folder).ends  # noqa: B018 (read when it is asked for)
            codec = TextCodec(folder / "tokenizer.json")
            codec.decode(codec.encode("Plain words, 12 é 🙂")[:50])

        return read

    return case


def _model(place: Place, family: str) -> Path:
    folder = place.made(family)
    tiny_model(family).save_pretrained(folder)
    return folder


def _bundle(place: Place) -> Path:
    """Return a bundle with all its JSON files, made by hand."""
    folder = TinyDecoder(external=True, quantized_head=True).write(place.made("bundle"), shared=True)
    source = open_source(_model(place, "llama"))
    make_plan(source.folder, Recipe.load("floats"), run=Run(threads=1)).save(folder / "plan.json")
    probe = make_probe(folder, 258)
    golden = Golden(probe, tuple((1, 2, 3) for _ in probe.prompts), 1e-3, 1e-2)
    (folder / "genai_config.json").write_text(json.dumps(_GENAI))
    write_manifest(folder, {"ep": "cpu", "shared_kv_cache": True, "golden": to_json(golden)})
    return folder


_GENAI: dict[str, Any] = {
    "model": {
        "bos_token_id": 256,
        "context_length": 96,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": "model.onnx",
            "head_size": 16,
            "hidden_size": 64,
            "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
            "outputs": {"logits": "logits", "present_key_names": "present.%d.key"},
            "num_attention_heads": 4,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
        },
        "eos_token_id": [257],
        "pad_token_id": 256,
        "type": "llama",
        "vocab_size": 258,
    },
    "search": {"max_length": 96, "past_present_share_buffer": True},
}
_GENAI_NAMES = (
    "filename",
    "custom_ops_library",
    "enable_profiling",
    "vision",
    "pipeline",
    "search",
    "decoder",
)
_CONFIG_NAMES = (
    *(
        "rope_parameters",
        "rope_scaling",
        "quantization_config",
        "auto_map",
        "layer_types",
        "tie_word_embeddings",
    ),
    *(
        "head_dim",
        "num_key_value_heads",
        "sliding_window",
        "attention_bias",
        "vocab_size",
        "model_type",
        "dtype",
    ),
    *(
        "num_hidden_layers",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "max_position_embeddings",
    ),
    *(
        "transformers_weights",
        "architectures",
        "torch_dtype",
        "text_config",
        "partial_rotary_factor",
        "hidden_act",
    ),
)
_PLAN_NAMES = (
    "sites",
    "recipe",
    "shapes",
    "pruning",
    "table",
    "rank",
    "form",
    "quant",
    "layer",
    "predicted_loss",
)
_TOKENIZER_NAMES = (
    *(
        "added_tokens",
        "model",
        "vocab",
        "merges",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "type",
    ),
    *(
        "chat_template",
        "added_tokens_decoder",
        "extra_special_tokens",
        "tokenizer_class",
        "truncation",
        "padding",
    ),
    *(
        "eos_token",
        "unk_token",
        "unk_id",
        "pattern",
        "max_input_chars_per_word",
        "byte_fallback",
        "model_max_length",
    ),
)
_OTHER_MODELS = (
    models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", -2.0), ("ab", -1.5)], 0, False),
    models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"),
    models.WordLevel({"[UNK]": 0, "words": 1}, unk_token="[UNK]"),
)

KINDS: dict[str, Kind] = {
    "config.json": config,
    "safetensors header": safetensors_header,
    "safetensors index": safetensors_index,
    "GGUF": gguf,
    "recipe": recipe,
    "plan.json": plan,
    "manifest": manifest,
    "genai_config.json": genai_config,
    "external data": external_data,
    "tokenizer files": tokenizer,
}


def generator(seed: int, kind: str, number: int) -> Draw:
    """Return the generator of one case, so that it can be repeated alone."""
    return random.Random(f"{seed} {kind} {number}")

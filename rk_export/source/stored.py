"""A dense model on disk: an HF folder, a hub id or a GGUF file, read one decoder layer at a time from safetensors."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections import defaultdict
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rk_export.errors import InputError
from rk_export.json_codec import load_json
from rk_export.model.config_checks import check_counts, check_stated
from rk_export.model.description import describe
from rk_export.model.families.registry import FAMILIES
from rk_export.model.outputs import mark_states
from rk_export.model.torch_models import stored_buffers
from rk_export.model.wrapper_names import WrapperNames
from rk_export.passes.numerics.grid import Grid
from rk_export.plan import Pruning
from rk_export.report.records import Finding, Outcome
from rk_export.source.adapter import ADAPTER_CONFIG, Adapter, is_adapter, read_adapter, tokenizer_of
from rk_export.source.embedder import is_embedder
from rk_export.source.find_model import find_base, find_folder
from rk_export.source.fingerprints import files_fingerprint
from rk_export.source.model_tensors import model_tensors
from rk_export.source.protocol import Loading
from rk_export.source.quantized.tensors import OLD_CONFIGS, DequantizedTensors
from rk_export.source.read_as import read_as
from rk_export.source.remote_code import refuse_remote_code
from rk_export.source.stand_ins import stand_in
from rk_export.source.tensor_files import SafetensorFiles, StoredTensors
from rk_export.source.transformed import Transform, Transformed
from rk_export.source.weight_files import ADAPTER_WEIGHTS, check_known_layout
from rk_export.tensor_cache import name_model

logger = logging.getLogger(__name__)


_PIECE = 1 << 22  # numbers that are looked at together


class StoredModel(Loading):
    """A dense model on disk.

    Args:
        folder: An HF folder with config.json and safetensors.
        name: What the user called the model; `title`, for reports, leaves out where it lies on this machine.
        adapter: A LoRA adapter that is merged into it as its tensors are read.

    Raises:
        InputError: If the folder, its config or its weights are missing or broken, or do not belong together.
        UnsupportedModelError: If the architecture is unknown.

    Attributes:
        folder: Where the tokenizer lies: with the weights, or with an adapter that brings another one.
        description: What it is as the stored tensors say: a model that config.json ties is untied if its head is
            stored too.
        findings: What was done to the model on the way from its files.
        notices: What a reader of config.json alone would not expect.
        pruning: None: nothing is left out.
        changed: How its tensors differ from what transformers reads from the folder; empty where they do not.
        taken: What is known of a model of an unknown type that is a known family; None where the type is known.
    """

    findings: tuple[Finding, ...] = ()
    notices: tuple[str, ...] = ()
    pruning: Pruning | None = None
    changed: str = ""
    _quantized: DequantizedTensors | None = None
    _fingerprint: str | None = None

    def __init__(self, folder: Path, name: str, adapter: Adapter | None = None) -> None:
        self.name, self._weights = name, folder
        self.folder = folder if adapter is None else tokenizer_of(adapter.folder, folder)
        self.title = Path(name).name if Path(name).expanduser().exists() else name
        config = read_config(folder)
        read = read_as(config, folder / "config.json")
        opened = model_tensors(folder, read, adapter)
        self.description, self.notices = describe(opened.config), opened.notices
        self._names, self._part, self.taken = opened.names, opened.part, read.taken
        self._stored: StoredTensors = opened.tensors
        self._adapter = adapter
        if opened.quantized is not None:
            self._say_dequantized(opened.quantized)
        if adapter is not None:
            self._say_merged(adapter)
        for notice in opened.notices:
            logger.warning("%s: %s", self.title, notice)

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes as the folders that the model is read from, opened again there."""
        folder, base = self.origin
        return _opened_again, (folder.resolve(), base and base.resolve(), self.name)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that decide what the tensors are."""
        adapter = () if self._adapter is None else (self._adapter.folder / ADAPTER_CONFIG,)
        old = (path for name in OLD_CONFIGS if (path := self._weights / name).is_file())
        return (self._weights / "config.json", *adapter, *old, *sorted(self._stored.files))

    @property
    def origin(self) -> tuple[Path, Path | None]:
        """What `open_source` opens this source by: a folder, and the base model's folder where it is an adapter."""
        return (self._weights, None) if self._adapter is None else (self._adapter.folder, self._weights)

    @property
    def places(self) -> tuple[Path, ...]:
        """Files and folders that the model is read from, a GGUF file included; no output may replace them."""
        named = Path(self.name).expanduser()
        read = (self.folder, *self.origin, named if named.exists() else None)
        return tuple(path for path in read if path is not None)

    @property
    def wrapper(self) -> WrapperNames | None:
        """Names of the model around it, which reads images or sound too; None where it stands alone."""
        return None if self._part is None else self._part.names

    @property
    def has_grids(self) -> bool:
        """Whether the checkpoint stores any matrix on an integer grid."""
        return self._quantized is not None and self._quantized.has_grids

    def grid(self, name: str) -> Grid | None:
        """Return the stored codes (out, in) of a matrix, by its name in the model; None where there are none."""
        names = (name, name.partition(".")[2], f"{self.config.model_type}.{name}")
        grids = (self._quantized.grid(each) for each in names) if self._quantized else ()
        return next((grid for grid in grids if grid is not None), None)

    @property
    def stored(self) -> StoredTensors:
        """The checkpoint's tensors by name."""
        return self._stored

    def fingerprint(self, cache_dir: str | os.PathLike[str] | None = None) -> str:
        """Return the SHA-256 of the files that decide what the tensors are; they are looked at once."""
        if self._fingerprint is None:
            self._fingerprint = files_fingerprint(self.files, cache_dir)
            name_model(self._fingerprint, self.title)
        return self._fingerprint

    def then(self, transform: Transform) -> Transformed:
        """Return the model under a change."""
        return Transformed(self, (transform,))

    def structure(self) -> str:
        """Return a fingerprint of the names and shapes in the checkpoint; plans carry it."""
        shapes = sorted((name, list(shape)) for name, shape in self._stored.shapes.items())
        digest = hashlib.sha256(json.dumps([self.config.model_type, shapes]).encode())
        return digest.hexdigest()[:16]

    def parameter_count(self) -> int:
        """Return the parameters of the dense model, tied weights once."""
        return sum(map(math.prod, self._stored.shapes.values()))

    def stored_bytes(self) -> int:
        """Return the bytes of the safetensors files, without what is left out of a wrapper."""
        left_out = 0 if self._part is None else self._part.left_out_bytes
        return sum(path.stat().st_size for path in self._stored.files) - left_out

    @property
    def is_mapped(self) -> bool:
        """Whether the files hold every tensor as it is used, in float32: it is then mapped and not copied."""
        types = SafetensorFiles(sorted(self._stored.files)).types.values()
        return not self.changed and set(types) == {"F32"}

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights (parameters on meta, buffers real), to be filled layer by layer."""
        return self.description.skeleton()

    def load_layer(self, model: PreTrainedModel, index: int) -> nn.Module:
        """Fill one layer of a skeleton in float32, bring it into canonical form and return it."""
        path = f"{self.architecture.layers}.{index}"
        layer: nn.Module = model.get_submodule(path)
        self._fill(model, layer, path + ".")
        self.architecture.canonicalize(layer)
        return layer

    def load_rest(self, model: PreTrainedModel) -> None:
        """Fill everything outside the layers: embeddings, final norm, lm_head."""
        inside = self.architecture.layers + "."
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if name.startswith(inside) or not parameter.is_meta:
                continue
            owner, _, leaf = name.rpartition(".")
            if tied and owner == self.architecture.lm_head and leaf == "weight":
                continue
            _assign(model, name, self.tensor(name))
        if tied and self.architecture.lm_head:
            head = model.get_submodule(self.architecture.lm_head)
            head.weight = model.get_submodule(self.architecture.embedding).weight

    def tensor(self, key: str) -> Tensor:
        """Read one tensor as float32.

        Raises:
            InputError: If it is not finite or its file is broken.
        """
        tensor = self._stored.read(key).to(torch.float32)
        # In pieces: what is computed of a whole table takes more memory than the table.
        pieces = torch.split(tensor.flatten(), _PIECE)
        if not all(bool(torch.isfinite(part).all()) for part in pieces):
            bad = sum(int((~torch.isfinite(part)).sum()) for part in pieces)
            raise InputError(
                f"tensor {key!r} has {bad} values that are NaN or infinite",
                where=self._stored.place(key),
                fix="the checkpoint is damaged: download it again or repair that tensor",
            )
        return tensor

    def _fill(self, model: PreTrainedModel, module: nn.Module, prefix: str) -> None:
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                _assign(model, prefix + name, self._parameter(prefix + name))
        for name, buffer in stored_buffers(module):
            if prefix + name in self._stored.shapes:
                buffer.data = self.tensor(prefix + name)

    def _parameter(self, name: str) -> Tensor:
        """Read a parameter; where parts of it are stored, such as single experts, transformers' mapping joins them."""
        parts = self._parts.get(name)
        return self.tensor(name) if parts is None else self._names.joined(name, parts, self.tensor)

    @cached_property
    def _parts(self) -> dict[str, dict[str, str]]:
        """Of every parameter that is stored in parts, the pattern of each part by its stored name."""
        found: defaultdict[str, dict[str, str]] = defaultdict(dict)
        for name in self._stored.shapes:
            target = self._names.target(name)
            if target is not None and target.pattern is not None:
                found[target.name][name] = target.pattern
        return dict(found)

    def _say_dequantized(self, quantized: DequantizedTensors) -> None:
        """Note among findings and notices that the matrices are dequantized."""
        self._quantized, self.changed = quantized, "the matrices are stored quantized"
        self.findings = (quantized.finding,)

    def _say_merged(self, adapter: Adapter) -> None:
        """Note the merged adapter among findings and notices."""
        self.changed = "; ".join(filter(None, (self.changed, "a LoRA adapter is merged")))
        matrices, replaced, rule = len(adapter.pairs), len(adapter.whole), adapter.rule
        details = {
            "pass": "merge",
            "adapter": adapter.folder.name,
            "matrices": matrices,
            "replaced": replaced,
        }
        self.findings = (
            *self.findings,
            Finding("adapter", Outcome.APPLIED, details=details | {"r": rule.rank, "lora_alpha": rule.alpha}),
        )
        whole = f", and {replaced} trained tensors taken from it" if replaced else ""
        self.notices = (
            f"The LoRA adapter {adapter.folder.name} (r {rule.rank}, alpha {rule.alpha:g}) is merged into "
            f"{matrices} matrices of {self._weights.name}{whole}.",
            *self.notices,
        )
        logger.info("%s", self.notices[0])


def open_source(model: str | Path, base: str | Path | None = None) -> StoredModel:
    """Open a dense model: an HF folder, a GGUF file, a hub id, or a LoRA adapter of one of these.

    Args:
        model: The model, or an adapter's folder or hub id.
        base: The base model of an adapter; None takes the one that its configuration names.

    Raises:
        InputError: If nothing usable is there.
    """
    folder = find_folder(model)
    if is_adapter(folder):
        refuse_remote_code(folder)
        adapter = read_adapter(folder)
        return StoredModel(find_base(adapter, base), str(model), adapter)
    if base is not None:
        raise InputError(
            "goes with a LoRA adapter, and the model is none",
            where="--base",
            fix=f"drop it, or name a folder with {ADAPTER_CONFIG}",
        )
    return StoredModel(folder, str(model))


def _opened_again(folder: Path, base: Path | None, name: str) -> StoredModel:
    if base is None:
        return StoredModel(folder, name)
    return StoredModel(base, name, read_adapter(folder))


def read_config(folder: Path) -> PretrainedConfig:
    """Read config.json.

    Raises:
        InputError: If it is missing, broken, of an unknown model type, or of a form that only other tools read, or
            the folder names code of its own.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise _no_config(folder)
    if found := stand_in(path):
        raise InputError(f"is {found}", where=str(path), fix="download the file itself")
    stated = load_json(path, fix="check the file")
    refuse_remote_code(folder)
    check_known_layout(folder, stated)
    check_stated(stated, path)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # as in `transformers_model`: a wrong value raises anything
        raise InputError(
            f"cannot be read: {_first_reason(error)}", where=str(path), fix="check the file"
        ) from error
    check_counts(config, path)
    family = FAMILIES.get(config.model_type)
    if family is not None and family.decoder is not None and is_embedder(folder):
        mark_states(config)
    # Which kernels computed the model is no part of it, and those that a file names may not be installed here.
    config._attn_implementation = config._experts_implementation = None
    return config


def _first_reason(error: Exception) -> str:
    """Return the first line of an error, with the next one where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _no_config(folder: Path) -> InputError:
    """Return the message about a folder without config.json, from what lies there instead."""
    if (folder / ADAPTER_WEIGHTS).is_file():
        return InputError(
            f"{ADAPTER_WEIGHTS} without {ADAPTER_CONFIG}, which holds the scale of the adapter",
            where=str(folder),
            fix=f"add the adapter's {ADAPTER_CONFIG} and give --base MODEL",
        )
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    hint = f"; the folder {inner[0]} in it has one" if inner else ""
    return InputError(
        f"no config.json{hint}", where=str(folder), fix="name a folder that save_pretrained wrote"
    )


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    target = module.get_submodule(owner)
    expected = getattr(target, leaf).shape
    if tensor.shape != expected:
        raise InputError(
            f"it has shape {list(tensor.shape)}, the config asks for {list(expected)}",
            where=name,
            fix="config.json and the weights do not belong together",
        )
    setattr(target, leaf, nn.Parameter(tensor, requires_grad=False))

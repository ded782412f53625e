"""Model sources: an HF folder, a hub id or a GGUF file, read one decoder layer at a time from safetensors."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
from functools import cached_property
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from rk_export.architectures import Architecture, architecture_of, empty_model
from rk_export.errors import InputError
from rk_export.gguf import gguf_to_folder
from rk_export.gguf_header import begins_as_gguf
from rk_export.passes.numerics.grid import Grid
from rk_export.plan import Pruning
from rk_export.quantized_tensors import DequantizedTensors, dequantized
from rk_export.remote_code import refuse_remote_code
from rk_export.report import Finding
from rk_export.tensor_files import StoredTensors, open_tensors

logger = logging.getLogger(__name__)

HUB_PATTERNS = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer*", "*.model"]
# Families whose checkpoints store tensors in another arrangement than their modules; transformers converts them.
CONVERTED_ON_LOAD = frozenset({"mixtral", "qwen3_moe"})


class ModelSource:
    """A dense model on disk.

    Args:
        folder: An HF folder with config.json and safetensors.
        name: What the user called the model; `title`, for reports, leaves out where it lies on this machine.

    Raises:
        InputError: If the folder, its config or its weights are missing or broken.
        UnsupportedModelError: If the architecture is unknown.

    Attributes:
        findings: What was done to the model on the way from its files.
        variant: Tells sources of one folder apart that give other tensors; empty where they are the folder's own.
        pruning: What whole structures the source leaves out; None for none.
        changed: How its tensors differ from what transformers reads from the folder; empty where they do not.
    """

    findings: tuple[Finding, ...] = ()
    variant: str = ""
    pruning: Pruning | None = None
    changed: str = ""
    _quantized: DequantizedTensors | None = None

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.title = Path(name).name if Path(name).expanduser().exists() else name
        self.config = read_config(folder)
        self.architecture: Architecture = architecture_of(self.config)
        self._whole = self.config.model_type in CONVERTED_ON_LOAD
        self._stored: StoredTensors = dequantized(open_tensors(folder), self.config)
        if isinstance(self._stored, DequantizedTensors):
            self._quantized, self.changed = self._stored, "the matrices are stored quantized"
        if hasattr(self.config, "quantization_config"):
            del self.config.quantization_config  # the model that is built and exported is in floats

    @property
    def on_reading(self) -> tuple[Finding, ...]:
        """What is done to the tensors while they are read."""
        return () if self._quantized is None else (self._quantized.finding,)

    @property
    def has_grids(self) -> bool:
        """Whether the checkpoint stores any matrix on an integer grid."""
        return self._quantized is not None and self._quantized.has_grids

    def grid(self, name: str) -> Grid | None:
        """Return the stored codes (out, in) of a matrix, by its name in the model; None where there are none."""
        names = (name, name.partition(".")[2], f"{self.config.model_type}.{name}")
        grids = (self._quantized.grid(each) for each in names) if self._quantized else ()
        return next((grid for grid in grids if grid is not None), None)

    @cached_property
    def layer_count(self) -> int:
        """Number of decoder (or encoder) layers."""
        return int(self.config.num_hidden_layers)

    @property
    def stored(self) -> StoredTensors:
        """The checkpoint's tensors by name."""
        return self._stored

    def structure(self) -> str:
        """Return a fingerprint of the names and shapes in the checkpoint; plans carry it."""
        shapes = sorted((name, list(shape)) for name, shape in self._stored.shapes.items())
        digest = hashlib.sha256(json.dumps([self.config.model_type, shapes]).encode())
        return digest.hexdigest()[:16]

    def parameter_count(self) -> int:
        """Return the parameters of the dense model, tied weights once."""
        return sum(map(math.prod, self._stored.shapes.values()))

    def stored_bytes(self) -> int:
        """Return the bytes of the safetensors files."""
        return sum(path.stat().st_size for path in self._stored.files)

    def skeleton(self) -> PreTrainedModel:
        """Return the model without weights (parameters on meta, buffers real), to be filled layer by layer.

        A family that is converted on loading comes whole instead, once, and its weights are already there.
        """
        if self._whole:
            logger.info("%s is converted while loading: the model is read whole", self.config.model_type)
            return self._load_whole()
        return empty_model(self.config)

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
            if self.architecture.is_encoder and owner.startswith(self.architecture.unused):
                _assign(model, name, torch.zeros(parameter.shape))  # exported nowhere, and often not stored
                continue
            _assign(model, name, self.tensor(self._key(model, name)))
        if tied and self.architecture.lm_head:
            head = model.get_submodule(self.architecture.lm_head)
            head.weight = model.get_submodule(self.architecture.embedding).weight

    def load(self) -> PreTrainedModel:
        """Return the whole dense model in canonical form, float32."""
        model = self.skeleton()
        self.load_rest(model)
        for index in range(self.layer_count):
            self.load_layer(model, index)
        return model

    def tensor(self, key: str) -> Tensor:
        """Read one tensor as float32.

        Raises:
            InputError: If it is not finite or its file is broken.
        """
        tensor = self._stored.read(key).to(torch.float32)
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise InputError(
                f"tensor {key!r} has {bad} values that are NaN or infinite",
                where=self._stored.place(key),
                fix="the checkpoint is damaged: download it again or repair that tensor",
            )
        return tensor

    def _fill(self, model: PreTrainedModel, module: nn.Module, prefix: str) -> None:
        for name, parameter in list(module.named_parameters()):
            if parameter.is_meta:
                _assign(model, prefix + name, self.tensor(self._key(model, prefix + name)))

    def _key(self, model: PreTrainedModel, name: str) -> str:
        base = model.base_model_prefix + "."
        for key in (name, name.removeprefix(base), base + name):
            if key in self._stored.shapes:
                return key
        raise InputError(
            f"tensor {name!r} is missing",
            where=str(self.folder),
            fix="the checkpoint is incomplete: download it again",
        )

    def _load_whole(self) -> PreTrainedModel:
        tensors = {}
        for key in self._stored.shapes:
            tensor = self.tensor(key)
            if self._quantized is not None:
                tensors[key] = tensor
        folder, given = (None, tensors) if tensors else (self.folder, None)
        # The class itself: an auto class takes no state dict without a folder.
        model, info = type(empty_model(self.config)).from_pretrained(
            folder,
            config=copy.deepcopy(self.config),
            state_dict=given,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
        for name, stored, expected in info["mismatched_keys"]:
            raise InputError(
                f"it has shape {list(stored)}, the config asks for {list(expected)}",
                where=name,
                fix="config.json and the weights do not belong together",
            )
        if info["missing_keys"]:
            raise InputError(
                f"tensor {min(info['missing_keys'])!r} is missing",
                where=str(self.folder),
                fix="the checkpoint is incomplete: download it again",
            )
        result: PreTrainedModel = model.eval().requires_grad_(False)
        return result


def open_source(model: str | Path) -> ModelSource:
    """Open a dense model: an HF folder, a GGUF file or a hub id.

    Raises:
        InputError: If nothing usable is there.
    """
    source = _opened(model)
    for finding in source.on_reading:
        logger.warning("%s: %s", source.title, (finding.details or {})["notice"])
    return source


def _opened(model: str | Path) -> ModelSource:
    path = Path(model).expanduser()
    if path.is_file():
        if path.suffix != ".gguf" and not begins_as_gguf(path):
            raise InputError(
                "is a file but not a GGUF file",
                where=str(path),
                fix="name an HF folder, a .gguf file or a hub id",
            )
        return ModelSource(gguf_to_folder(path), str(model))
    if path.is_dir():
        return ModelSource(path, str(model))
    return ModelSource(_download(str(model)), str(model))


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise InputError(
            "no such file or folder",
            where=name,
            fix="name an HF folder, a .gguf file or a hub id like org/name",
        )
    try:
        refuse_remote_code(Path(snapshot_download(name, allow_patterns=["*.json"])))  # before gigabytes come
        return Path(snapshot_download(name, allow_patterns=HUB_PATTERNS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"neither a local folder nor a model that the hub delivers ({type(error).__name__})",
            where=name,
            fix="check the name, the network and, for gated models, your token",
        ) from error


def read_config(folder: Path) -> PretrainedConfig:
    """Read config.json.

    Raises:
        InputError: If it is missing, broken or of an unknown model type, or the folder names code of its own.
    """
    if not (folder / "config.json").is_file():
        raise InputError("no config.json", where=str(folder), fix="name a folder that save_pretrained wrote")
    refuse_remote_code(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise InputError(
            f"cannot be read: {str(error).splitlines()[0]}",
            where=str(folder / "config.json"),
            fix="check the file",
        ) from error
    # Which kernels computed the model is no part of it, and those that a file names may not be installed here.
    config._attn_implementation = config._experts_implementation = None
    return config


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

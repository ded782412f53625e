"""Everything in a bundle beside the graph: tokenizer, configs for each runtime, model card.

Folder and checksums, GenAI config, Triton repository and model card have a module each; all are public here.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from pathlib import Path

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig

from rk_export.errors import InputError
from rk_export.folders import AtomicFolder, check_free_space, check_manifest, sha256_of, write_manifest
from rk_export.genai import genai_config, write_genai_config
from rk_export.model_card import ModelCard, model_card
from rk_export.triton import triton_repository

__all__ = [
    "AtomicFolder",
    "ModelCard",
    "check_free_space",
    "check_manifest",
    "copy_tokenizer",
    "genai_config",
    "model_card",
    "sha256_of",
    "triton_repository",
    "write_genai_config",
    "write_manifest",
    "write_model_config",
    "write_side_files",
]

logger = logging.getLogger(__name__)

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)


def write_side_files(
    folder: Path, *, source: Path, config: PretrainedConfig, generation_from: Path | None = None
) -> GenerationConfig:
    """Write tokenizer, ``config.json`` and ``generation_config.json`` of the source model into a bundle.

    Args:
        folder: The bundle.
        source: Hugging Face folder of the model; the bundle of one without a tokenizer gets none either.
        config: Configuration of the exported model.
        generation_from: Folder of the generation config; None takes `source`.

    Returns:
        The generation defaults, as written.

    Raises:
        InputError: The source's generation config or tokenizer cannot be read.
    """
    write_model_config(folder, config)
    copy_tokenizer(source, folder)
    generation = _generation_config(generation_from or source, config)
    generation.save_pretrained(folder)
    return generation


def write_model_config(folder: Path, config: PretrainedConfig) -> None:
    """Write ``config.json`` without what sends a loader to remote code or to the source's quantization."""
    plain = copy.deepcopy(config)
    for name in ("quantization_config", "auto_map"):
        if hasattr(plain, name):
            delattr(plain, name)
    plain._name_or_path = ""  # often a private path
    (folder / "config.json").write_text(plain.to_json_string(), encoding="utf-8")


def _generation_config(source: Path, config: PretrainedConfig) -> GenerationConfig:
    if not (source / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError) as error:
        raise InputError(str(error), where=str(source / "generation_config.json")) from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a model folder's tokenizer, converted to ``tokenizer.json`` if need be; having none is a warning.

    Raises:
        InputError: The tokenizer cannot be converted.
    """
    present = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not present:
        logger.warning("%s holds no tokenizer: the bundle takes token ids only", source)
        return
    for name in present:
        shutil.copyfile(source / name, folder / name)
    if "tokenizer.json" not in present:  # GenAI and `tokenizers` read this form only
        try:
            AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
        except (OSError, ValueError, ImportError) as error:
            fix = "add the fast tokenizer's tokenizer.json to the model folder"
            raise InputError("the tokenizer cannot be converted", where=str(source), fix=fix) from error
    _name_known_class(folder / "tokenizer_config.json")


def _name_known_class(path: Path) -> None:
    """Replace the class name that only transformers 5 knows, so that older loaders take the file too."""
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for private in ("is_local", "local_files_only", "name_or_path"):
        values.pop(private, None)
    if values.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        # This class makes token_type_ids unless told otherwise, and no decoder graph takes them.
        values.setdefault("model_input_names", ["input_ids", "attention_mask"])
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

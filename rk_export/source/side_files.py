"""What a model folder holds beside the weights: tokenizer, config and generation defaults."""

from __future__ import annotations

import copy
from pathlib import Path

from transformers import GenerationConfig, PretrainedConfig

from rk_export.errors import InputError
from rk_export.model.description import reads_types
from rk_export.runtime.ends import read_ends
from rk_export.runtime.special_tokens import SpecialTokens
from rk_export.source.sentence_head import copy_sentence_files
from rk_export.source.tokenizer_files import copy_tokenizer


def write_side_files(
    folder: Path, *, source: Path, config: PretrainedConfig, generation_from: Path | None = None
) -> GenerationConfig:
    """Write tokenizer, ``config.json`` and ``generation_config.json`` of the source model into a bundle.

    The generation config names every end of `read_ends`, so that each runtime ends a text at the same tokens.

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
    generation = write_own_files(folder, source=source, config=config, generation_from=generation_from)
    generation.eos_token_id = read_ends(folder).eos_token_id
    if generation.bos_token_id is None:
        tokens = SpecialTokens.read(folder)
        generation.bos_token_id = tokens.id_of(tokens.named.get("bos_token", ""))
    generation.save_pretrained(folder)
    return generation


def write_own_files(
    folder: Path, *, source: Path, config: PretrainedConfig, generation_from: Path | None = None
) -> GenerationConfig:
    """Write the files of `write_side_files` with the ends as the model itself names them in each."""
    write_model_config(folder, config)
    copy_tokenizer(source, folder, types=reads_types(config))
    copy_sentence_files(source, folder)
    generation = _generation_config(generation_from or source, config)
    generation.save_pretrained(folder)
    return generation


def write_model_config(folder: Path, config: PretrainedConfig) -> None:
    """Write ``config.json`` without what sends a loader to remote code or to the source's quantization."""
    plain = copy.deepcopy(config)
    for name in ("quantization_config", "auto_map", "custom_pipelines"):
        if hasattr(plain, name):
            delattr(plain, name)
    plain._name_or_path = ""  # often a private path
    (folder / "config.json").write_text(plain.to_json_string(), encoding="utf-8")


def _generation_config(source: Path, config: PretrainedConfig) -> GenerationConfig:
    if not (source / "generation_config.json").is_file():
        return GenerationConfig.from_model_config(config)
    try:
        return GenerationConfig.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, TypeError, AttributeError) as error:  # the last two: it is no JSON object
        where = str(source / "generation_config.json")
        raise InputError(str(error), where=where, fix="repair the file, or remove it") from error

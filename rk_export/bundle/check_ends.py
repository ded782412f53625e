"""Where texts of a model will end, asked before any work begins."""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.runtime.ends import Ends, read_ends
from rk_export.source.side_files import write_own_files

logger = logging.getLogger(__name__)


def check_ends(folder: Path, config: PretrainedConfig, generation_from: Path | None = None) -> Ends:
    """Return the ends that a decoder's bundle will have, and warn of what names one in vain.

    The bundle's tokenizer and configs are written to a temporary place, so what cannot be written is refused too.

    Args:
        folder: Hugging Face folder of the model.
        config: Its configuration.
        generation_from: Folder of the generation config; None takes `folder`.

    Raises:
        InputError: No file names a token at which a text ends, or a file of the tokenizer cannot be used.
    """
    with TemporaryDirectory() as scratch:
        try:
            write_own_files(Path(scratch), source=folder, config=config, generation_from=generation_from)
            ends = read_ends(Path(scratch))
        except InputError as error:
            where = error.where and error.where.replace(scratch, str(folder))
            raise InputError(error.what, where=where, fix=error.fix) from error
    for reason in ends.ignored:
        logger.warning("%s: not an end of texts: %s", folder, reason)
    if not ends.ids:
        vain = "; ".join(ends.ignored)
        raise InputError(
            f"no file names a token that ends a text{f' ({vain})' if vain else ''}: generation could not stop",
            where=str(folder),
            fix="add eos_token_id to generation_config.json, or eos_token to tokenizer_config.json",
        )
    return ends

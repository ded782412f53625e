"""What a folder says about texts as vectors: the files of sentence-transformers, read without it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rk_export.errors import InputError
from rk_export.json_codec import load_json
from rk_export.runtime.bundle_files import Section

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"
TRANSFORMER_FILES = (
    "sentence_bert_config.json",
    *(f"sentence_{kind}_config.json" for kind in ("roberta", "distilbert", "camembert", "albert")),
    *(f"sentence_{kind}_config.json" for kind in ("xlm-roberta", "xlnet")),
)
_FIX = "repair the file, or write the folder again"


@dataclass(frozen=True)
class SentenceFiles:
    """How texts become tokens here.

    Args:
        prompts: Texts that are put in front of a text, by name.
        default_prompt: The name of the one that is taken where none is asked for; None adds nothing.
        longest: Tokens that a text is cut to; None where no file says so.
        lower_case: Whether texts are written in small letters first.
        normalizes: Whether the last of the model's modules scales vectors to length 1.
    """

    prompts: Mapping[str, str]
    default_prompt: str | None
    longest: int | None
    lower_case: bool
    normalizes: bool

    @classmethod
    def read(cls, folder: Path) -> SentenceFiles:
        """Read the files of a folder; missing ones say nothing.

        Raises:
            InputError: One is malformed.
        """
        settings, transformer = Section.of_file(folder / SETTINGS_FILE), read_transformer_settings(folder)
        prompts = dict(settings.section("prompts").values)
        default = settings.values.get("default_prompt_name")
        if not all(isinstance(text, str) for text in prompts.values()):
            raise InputError("prompts must be texts", where=settings.where, fix=_FIX)
        if default is not None and default not in prompts:
            raise InputError(
                f"default_prompt_name is {default!r}, which is no prompt", where=settings.where, fix=_FIX
            )
        return cls(
            prompts=prompts,
            default_prompt=default,
            longest=transformer.count("max_seq_length") or _tokenizer_length(folder),
            lower_case=bool(transformer.flag("do_lower_case")),
            normalizes=_normalizes(folder),
        )

    def prompt(self, text: str | None, name: str | None) -> str:
        """Return what is put in front of every text.

        Args:
            text: The prompt itself, or None.
            name: The name of one of `prompts`, or None.

        Raises:
            InputError: Both are given, the prompt is no text, or there is none of that name.
        """
        if text is not None and name is not None:
            raise InputError("both are given", where="prompt, prompt_name", fix="drop one")
        if text is not None:
            if not isinstance(text, str):
                raise InputError(f"a {type(text).__name__}", where="prompt", fix="give a text")
            return text
        if name is not None and name not in self.prompts:
            known = ", ".join(self.prompts) or "none"
            raise InputError(f"no prompt is named {name!r}", where="prompt_name", fix=f"known are: {known}")
        chosen = name or self.default_prompt
        return self.prompts[chosen] if chosen is not None else ""


def read_transformer_settings(folder: Path) -> Section:
    """Return the settings of sentence-transformers' first module; empty where the folder has none."""
    files = [folder / name for name in TRANSFORMER_FILES]
    return Section.of_file(next((path for path in files if path.is_file()), files[0]))


def _tokenizer_length(folder: Path) -> int | None:
    """Return the tokens that a tokenizer cuts texts to; huge numbers there stand for no limit."""
    stated = Section.of_file(folder / "tokenizer_config.json").values.get("model_max_length")
    return stated if type(stated) is int and 0 < stated < 1 << 31 else None


def _normalizes(folder: Path) -> bool:
    path = folder / MODULES_FILE
    modules = load_json(path, fix=_FIX) if path.is_file() else []
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise InputError("no list of modules", where=str(path), fix=_FIX)
    return bool(modules) and str(modules[-1].get("type")).endswith(".Normalize")

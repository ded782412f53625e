"""Reads the JSON files of a bundle: context length, sizes, cache layout, ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.inside import check_links
from rk_export.runtime.bundle_files import MODEL_FILE, Section, is_count
from rk_export.runtime.ends import Ends, read_ends


@dataclass(frozen=True)
class BundleConfig:
    """What the runtime needs to know about a bundle beside its graph.

    Args:
        folder: The bundle.
        context_length: Most positions the model was made for, or None where no file says so.
        rotary_switch: Longest sequence under LongRoPE's short factors, or None where one rotation serves all.
        vocab_size: Rows of the embedding, or None where no file says so.
        head_size: Elements of one attention head, or None where no file says so.
        kv_heads: Key/value heads of a layer, or None where no file says so.
        shared_cache: Whether past and present may be one buffer, or None where no file says so.
    """

    folder: Path
    context_length: int | None
    rotary_switch: int | None
    vocab_size: int | None
    head_size: int | None
    kv_heads: int | None
    shared_cache: bool | None

    @property
    def model_path(self) -> Path:
        """The graph; its external data lies beside it."""
        return self.folder / MODEL_FILE

    @cached_property
    def ends(self) -> Ends:
        """Tokens that end a generation, read when they are first asked for.

        Raises:
            InputError: A file that names one is malformed.
        """
        return read_ends(self.folder)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids of the tokens that end a generation."""
        return frozenset(self.ends.ids)

    @classmethod
    def read(cls, folder: str | Path) -> BundleConfig:
        """Read ``config.json``, ``genai_config.json`` and ``rk_manifest.json``.

        Raises:
            InputError: The folder or its graph is missing, holds a link that leads out of it, or a file is not valid
                JSON or states something else than sizes.
        """
        folder = Path(folder)
        if not (folder / MODEL_FILE).is_file():
            raise InputError(
                f"no {MODEL_FILE} here", where=str(folder), fix="give a folder written by rk-export or GenAI"
            )
        check_links(folder)
        config = Section.of_file(folder / "config.json")
        text_config = config.section("text_config")
        text_config = text_config if text_config.values else config
        genai = Section.of_file(folder / "genai_config.json")
        model = genai.section("model")
        decoder = model.section("decoder")
        manifest = Section.of_file(folder / "rk_manifest.json")
        switch = rotary_switch(text_config.values)
        stated = model.count("context_length")
        return cls(
            folder=folder,
            context_length=_first(
                # GenAI is told the switch where it cannot follow it; this runtime can.
                None if stated == switch else stated,
                # RoBERTa's table has rows that no token takes.
                manifest.count("context_length"),
                text_config.count("max_position_embeddings"),
            ),
            rotary_switch=switch,
            vocab_size=_first(model.count("vocab_size"), text_config.count("vocab_size")),
            head_size=_first(
                decoder.count("head_size"), text_config.count("head_dim"), _head_size(text_config)
            ),
            kv_heads=_first(decoder.count("num_key_value_heads"), text_config.count("num_key_value_heads")),
            shared_cache=_first(
                manifest.flag("shared_kv_cache"),
                genai.section("search").flag("past_present_share_buffer"),
            ),
        )


# Families whose code in transformers takes the short factors of LongRoPE for texts of any length.
SHORT_FACTORS_ONLY = ("phimoe",)


def rotary_switch(config: Mapping[str, Any]) -> int | None:
    """Return the longest sequence that LongRoPE (arXiv:2402.13753) rotates by its short factors.

    Args:
        config: A Hugging Face config as a dictionary.

    Returns:
        None where the model rotates otherwise, or never gets to its long factors.
    """
    if config.get("model_type") in SHORT_FACTORS_ONLY:
        return None
    stated = config.get("rope_parameters") or config.get("rope_scaling")
    parameters = stated if isinstance(stated, dict) else {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    switches = [
        _first(config.get("original_max_position_embeddings"), kind.get("original_max_position_embeddings"))
        for kind in kinds
        if _first(kind.get("rope_type"), kind.get("type")) == "longrope"
    ]
    longest = config.get("max_position_embeddings")
    if not is_count(longest):
        return None
    return min((switch for switch in switches if is_count(switch) and switch < longest), default=None)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _head_size(config: Section) -> int | None:
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    return hidden // heads if hidden and heads else None

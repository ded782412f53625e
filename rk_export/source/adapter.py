"""A LoRA adapter folder as PEFT writes it: its configuration, and which of its tensors is what."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rk_export.errors import InputError
from rk_export.json_codec import load_json
from rk_export.source.renamed_tensors import without_wrappers
from rk_export.source.tensor_files import FLOATS, SafetensorFiles
from rk_export.source.weight_files import ADAPTER_WEIGHTS

ADAPTER_CONFIG = "adapter_config.json"
MERGE_WITH_PEFT = (
    "merge it with peft: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder)"
)
_PREFIX = "base_model.model."
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(?P<rest>(?:\.[^.]+)*)"
)

Number = TypeVar("Number", int, float)

# What changes the merged weights in a way that is not reproduced here.
_NOT_MERGED = (
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "megatron_config",
)
# Starting points that also changed the base model's weights: the adapter alone does not tell how.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraRule:
    """How strongly the pairs of an adapter count.

    Args:
        rank: Of every pair that no pattern names.
        alpha: Numerator of the scale of every pair that no pattern names.
        rank_stabilized: Whether the scale is alpha over the square root of the rank (2312.03732), not over the rank.
        ranks: Rank by pattern of a module's path.
        alphas: Alpha by pattern of a module's path.
        keeps_ties: Whether a change of a tied embedding is meant for the output projection too.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    keeps_ties: bool

    def rank_of(self, module: str) -> int:
        """Return the rank that the configuration gives a module."""
        return _of_pattern(self.ranks, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return the numerator of a module's scale."""
        return _of_pattern(self.alphas, module, self.alpha)

    def scale(self, module: str) -> float:
        """Return the factor of a module's product of pairs (2106.09685, section 4.1)."""
        rank, alpha = self.rank_of(module), self.alpha_of(module)
        return alpha / math.sqrt(rank) if self.rank_stabilized else alpha / rank


def _of_pattern(patterns: Mapping[str, Number], module: str, default: Number) -> Number:
    """Return the value of the first pattern that a module's path ends with."""
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


@dataclass(frozen=True)
class Adapter:
    """An adapter folder.

    Args:
        folder: Where it lies.
        rule: Scales of its pairs.
        base: Name or path of the base model in its configuration, or None.
        revision: Of the base model on the hub, or None.
        tensors: Everything that is stored.
        pairs: Of each changed module, the stored name of each part: `A`, `B`, `embedding_A` ...; `bias` is that of B.
        whole: Stored name of each tensor that replaces one of the base model, by that tensor's name.
        copied: Those of them that belong to a trained copy of a module (`modules_to_save`).
        base_class: Class of the base model, where the configuration names it.
    """

    folder: Path
    rule: LoraRule
    base: str | None
    revision: str | None
    tensors: SafetensorFiles
    pairs: Mapping[str, Mapping[str, str]]
    whole: Mapping[str, str]
    copied: frozenset[str] = frozenset()
    base_class: str | None = None


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER_CONFIG).is_file()


def read_adapter(folder: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        InputError: If it is broken, or an adapter of a kind that cannot be merged here.
    """
    values = _read_config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise InputError(
            "only pickle weights (adapter_model.bin), which can run code when loaded and are never read"
            if pickled
            else f"{ADAPTER_CONFIG} without {ADAPTER_WEIGHTS}",
            where=str(folder),
            fix="save the adapter again: model.save_pretrained(folder) writes safetensors",
        )
    tensors = SafetensorFiles([path])
    _check_types(tensors)
    pairs, whole = _sorted_tensors(tensors, folder)
    mapping = values.get("auto_mapping")
    return Adapter(
        folder,
        _rule(values, folder / ADAPTER_CONFIG),
        _text(values, "base_model_name_or_path"),
        _text(values, "revision"),
        tensors,
        pairs,
        whole,
        _copied(whole, values.get("modules_to_save")),
        _text(mapping, "base_model_class") if isinstance(mapping, dict) else None,
    )


def _check_types(tensors: SafetensorFiles) -> None:
    for name, stored in tensors.types.items():
        if stored not in FLOATS:
            raise InputError(
                f"tensor {name!r} is stored as {stored}: there are no scales to read its values with",
                where=tensors.place(name),
                fix="save the adapter in floats",
            )


def _copied(whole: Mapping[str, str], modules: Any) -> frozenset[str]:
    """Return the tensors of the modules that the configuration lists as trained copies."""
    listed = [str(module) for module in modules] if isinstance(modules, (list, tuple)) else []
    owners = {name: name.rpartition(".")[0] for name in whole}
    return frozenset(
        name for name, owner in owners.items() if any(f".{owner}".endswith(f".{module}") for module in listed)
    )


def _text(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    return value if isinstance(value, str) and value else None


def _read_config(path: Path) -> dict[str, Any]:
    values = load_json(path, fix="check the file")
    if not isinstance(values, dict):
        raise InputError("is no object", where=str(path), fix="check the file")
    kind = values.get("peft_type")
    if kind != "LORA":
        raise InputError(
            f"an adapter of the kind {kind}; only LORA is merged", where=str(path), fix=MERGE_WITH_PEFT
        )
    if used := [name for name in _NOT_MERGED if values.get(name)]:
        raise InputError(
            f"an adapter with {used[0]}, which is not merged", where=str(path), fix=MERGE_WITH_PEFT
        )
    start = str(values.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGED_BASE):
        raise InputError(
            f"training began with {start}, which changes the base model's own weights as well",
            where=str(path),
            fix="convert it to a plain LoRA adapter with peft (path_initial_model_for_weight_conversion), or "
            + MERGE_WITH_PEFT,
        )
    return values


def _rule(values: Mapping[str, Any], path: Path) -> LoraRule:
    try:
        rule = LoraRule(
            int(values["r"]),
            float(values["lora_alpha"]),
            bool(values.get("use_rslora")),
            {str(key): int(rank) for key, rank in (values.get("rank_pattern") or {}).items()},
            {str(key): float(alpha) for key, alpha in (values.get("alpha_pattern") or {}).items()},
            bool(values.get("ensure_weight_tying")),
        )
        numbers = [rule.rank, rule.alpha, *rule.ranks.values(), *rule.alphas.values()]
        if min(rule.rank, *rule.ranks.values(), 1) < 1 or not all(map(math.isfinite, numbers)):
            raise ValueError("a rank is below 1, or a number is not finite")
        for pattern in (*rule.ranks, *rule.alphas):
            re.compile(pattern)
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise InputError(
            f"r, lora_alpha or their patterns cannot be read ({type(error).__name__}: {error})",
            where=str(path),
            fix="save the adapter again with peft",
        ) from error
    return rule


def _sorted_tensors(
    tensors: SafetensorFiles, folder: Path
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Tell the pairs of an adapter from tensors that were trained whole."""
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    adapters: set[str] = set()
    for stored in tensors.shapes:
        name = without_wrappers(stored).removeprefix(_PREFIX)
        match = _LORA.fullmatch(name)
        if match is None:
            whole[name] = stored
            continue
        rest = [part for part in match["rest"].split(".") if part]
        leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else "weight"
        adapters.update(rest)
        part = "bias" if leaf == "bias" else match["part"]
        pairs.setdefault(match["module"], {})[part] = stored
    if len(adapters) > 1:
        raise InputError(
            f"holds {len(adapters)} adapters: {', '.join(sorted(adapters))}",
            where=str(folder / ADAPTER_WEIGHTS),
            fix="save the one that is wanted by itself",
        )
    for module, parts in pairs.items():
        if not ({"A", "B"} <= parts.keys() or {"embedding_A", "embedding_B"} <= parts.keys()):
            raise InputError(
                f"the pair of {module} is incomplete: only {', '.join(sorted(parts))}",
                where=str(folder / ADAPTER_WEIGHTS),
                fix="save the adapter again",
            )
    if not pairs and not whole:
        raise InputError("holds no tensor", where=str(folder / ADAPTER_WEIGHTS), fix="save the adapter again")
    return pairs, whole


def tokenizer_of(adapter: Path, base: Path) -> Path:
    """Return the folder whose tokenizer goes with an adapted model: the adapter's where it brings another one."""
    own, given = (folder / "tokenizer.json" for folder in (adapter, base))
    if not own.is_file() or (given.is_file() and own.read_bytes() == given.read_bytes()):
        return base
    return adapter

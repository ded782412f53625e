"""Which files of a model folder hold its weights, and what lies there where none of ours do."""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from rk_export.errors import InputError
from rk_export.inside import checked_name
from rk_export.json_codec import load_json
from rk_export.source.tensor_files import SafetensorFiles

logger = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = f"{SINGLE_FILE}.index.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
MISTRAL_OWN = "consolidated"  # Mistral publishes its weights a second time, under names of its own
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d+)-of-(?P<count>\d+)\.safetensors")
_AGAIN = "the checkpoint is incomplete: download it again"


def open_tensors(folder: Path, named: object = None) -> SafetensorFiles:
    """Find the safetensors files of a model folder, in transformers' order: one file, an index, what else there is.

    Args:
        folder: The model folder.
        named: File or index that the config names (`transformers_weights`), before any other.

    Raises:
        InputError: If there are none, one is missing or broken, or it is not clear which they are.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if named is not None:
        path = folder / str(named)
        if not path.name.endswith((".safetensors", ".safetensors.index.json")) or path.parent != folder:
            raise InputError(
                f"transformers_weights is {named!r}, no safetensors file or index of this folder",
                where=str(folder / "config.json"),
                fix="name a file that lies beside config.json, or drop the entry",
            )
        return (
            _reported(folder, [path], {})
            if path.name.endswith(".safetensors")
            else _reported(folder, *_indexed(path))
        )
    if single.is_file():
        used = [single]
    elif index.is_file():
        return _reported(folder, *_indexed(index))
    else:
        used = _without_index(folder)
    return _reported(folder, used, {})


def _reported(folder: Path, used: list[Path], listed: dict[str, Path]) -> SafetensorFiles:
    """Open the files, hold them to what the index lists, and say which other ones are not read."""
    tensors = SafetensorFiles(used)
    present = tensors.shapes
    for name, path in sorted(listed.items()):
        if name not in present:
            raise InputError(
                f"tensor {name!r} is missing, which the index puts there", where=str(path), fix=_AGAIN
            )
    if not present:
        raise InputError("holds no tensor", where=str(used[0]), fix=_AGAIN)
    others = sorted(path.name for path in folder.glob("*.safetensors") if path not in used)
    if others := [name for name in others if name != ADAPTER_WEIGHTS]:
        logger.warning(
            "%s: read from %s, as transformers does; not read: %s",
            folder,
            used[0].name if len(used) == 1 else f"{len(used)} shards",
            ", ".join(others),
        )
    return tensors


def _indexed(index: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the files that an index lists, and the place of each tensor."""
    if not index.is_file():
        raise InputError("is missing", where=str(index), fix=_AGAIN)
    data = load_json(index, fix="download it again")
    names = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(names, dict):
        raise InputError("is not a weight index", where=str(index), fix="download it again")
    if not names:
        raise InputError("lists no tensor", where=str(index), fix="download it again")
    fix = "put the shards into the folder, and their names into the index"
    places = {
        key: index.parent / checked_name(name, where=str(index), fix=fix) for key, name in names.items()
    }
    return sorted(set(places.values())), places


def _without_index(folder: Path) -> list[Path]:
    """Return numbered shards, or the one file that there is."""
    own = [path for path in sorted(folder.glob("*.safetensors")) if path.name != ADAPTER_WEIGHTS]
    paths = [path for path in own if not path.name.startswith(MISTRAL_OWN)]
    shards = [match for path in paths if (match := _SHARD.fullmatch(path.name))]
    if shards:
        return _shards(folder, shards)
    if len(paths) == 1:
        logger.warning("%s: no %s; read from %s", folder, SINGLE_FILE, paths[0].name)
        return paths
    raise _nothing_usable(folder, paths, own)


def _shards(folder: Path, shards: list[re.Match[str]]) -> list[Path]:
    """Return the shards of a model without an index; all of them must be there."""
    sets: dict[tuple[str, int], set[int]] = defaultdict(set)
    for match in shards:
        sets[match["stem"], int(match["count"])].add(int(match["number"]))
    if len(sets) > 1:
        found = " and ".join(f"{stem}-*-of-{count}" for stem, count in sorted(sets))
        raise InputError(
            f"two sets of shards and no {INDEX_FILE}: {found}",
            where=str(folder),
            fix="leave one of them in the folder",
        )
    ((stem, count), numbers) = next(iter(sets.items()))
    wanted = set(range(min(numbers | {1}), min(numbers | {1}) + count))  # a few tools count from 0
    if missing := sorted(wanted - numbers):
        raise InputError(
            f"shard {missing[0]} of {count} is missing"
            + (f", and {len(missing) - 1} more" if missing[1:] else ""),
            where=str(folder / f"{stem}-{missing[0]:05d}-of-{count:05d}.safetensors"),
            fix=_AGAIN,
        )
    logger.warning("%s: no %s; read from all %d shards", folder, INDEX_FILE, count)
    return sorted(folder / match.string for match in shards)


def _nothing_usable(folder: Path, paths: list[Path], own: list[Path]) -> InputError:
    """Return the message about a folder without weights of ours, from what lies there."""
    if paths:
        return InputError(
            f"{len(paths)} safetensors files, none of them {SINGLE_FILE} or a numbered shard: "
            + ", ".join(path.name for path in paths),
            where=str(folder),
            fix=f"leave one of them, or add {INDEX_FILE}, which says what lies where",
        )
    if own:
        return InputError(
            f"only {own[0].name}: Mistral's own format, with names that transformers does not use",
            where=str(folder),
            fix="download the model-*.safetensors files of the same model too",
        )
    if (folder / ADAPTER_WEIGHTS).is_file():
        return InputError(
            f"only {ADAPTER_WEIGHTS}: an adapter, without the weights of its base model",
            where=str(folder),
            fix="add its adapter_config.json to the folder and give --base MODEL",
        )
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return InputError(
            f"only pickle weights ({pickles[0]}), which can run code when loaded and are never read",
            where=str(folder),
            fix="convert it once where you trust it: model.save_pretrained(folder) writes safetensors",
        )
    if files := sorted(folder.glob("*.gguf")):
        return InputError(
            f"only GGUF weights ({files[0].name}) beside a config.json of another form",
            where=str(folder),
            fix=f"name the file: {files[0]}",
        )
    for pattern, format_ in {
        "*.h5": "TensorFlow",
        "*.msgpack": "Flax",
        "*.npz": "NumPy",
        "*.onnx": "ONNX",
    }.items():
        if found := sorted(folder.glob(pattern)):
            return InputError(
                f"only {format_} weights ({found[0].name})",
                where=str(folder),
                fix="name a folder with safetensors weights of the same model",
            )
    return InputError(f"no {SINGLE_FILE}", where=str(folder), fix="name a folder with safetensors weights")


def check_known_layout(folder: Path, config: Any) -> None:
    """Refuse a folder that other tools wrote in a form of their own, and say what it is.

    Args:
        folder: The model folder.
        config: Its config.json as it is.

    Raises:
        InputError: If it is a quantized MLX checkpoint, or the file holds no object.
    """
    if not isinstance(config, dict):
        raise InputError(
            f"holds no JSON object but {type(config).__name__}",
            where=str(folder / "config.json"),
            fix="take the file that the model was published with",
        )
    mlx = config.get("quantization")
    if isinstance(mlx, dict) and "bits" in mlx:
        raise InputError(
            f"an MLX checkpoint (mlx_lm), quantized to {mlx['bits']} bits in groups of {mlx.get('group_size')}",
            where=str(folder),
            fix="use the original model that it was converted from",
        )

"""Text that a model writes itself, as calibration text of a model that comes without any.

Tokens are drawn from the full distribution at temperature 1, so that the text is distributed as the model
believes text to be. After an end-of-sequence token the start token follows: a sequence is packed text.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.masking_utils import sdpa_mask

from rk_export.device import matmul_dtype
from rk_export.errors import InputError
from rk_export.model.context import own_context
from rk_export.model.families.registry import heads_of
from rk_export.progress import Bar, stage
from rk_export.runtime.special_tokens import listed_tokens
from rk_export.source.protocol import Source
from rk_export.tensor_cache import cache_file, read_tensors, write_tensors

logger = logging.getLogger(__name__)

LENGTH = 256  # tokens of a sequence, unless the model's context is shorter
DENSE_LIMIT = 1_000_000_000  # bytes of a model that writes its own text on the CPU
_VERSION = 2  # raise when other tokens come out: cached text of an older version is then sampled again
_SEQUENCES = 64  # sampled together
_CACHE_BYTES = 2 << 30  # keys and values of the sequences sampled together
_PACKED = "rk_export_packed_heads"

# From a model, random numbers (sequences, length), the start token and the end tokens to text, as `sample_text` does.
Writer = Callable[[Source, Tensor, int, list[int]], Tensor]


def self_text(
    source: Source,
    tokens: int,
    seed: int,
    device: torch.device,
    *,
    other: Writer | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Return text sampled from a dense decoder, or the one sampled earlier from the same weights.

    Weights are in bfloat16 where the device multiplies it natively (`matmul_dtype`), else in float32; logits are
    normalized in float32. A model that would take more than `writer_limit` in memory that way does not write itself.

    Args:
        source: The dense model.
        tokens: How many tokens at least; sequences are whole.
        seed: Equal seeds give equal tokens on equal hardware.
        device: Where the model runs.
        other: Writes instead of a model that is too large; None lets every model write itself.
        cache_dir: Where sampled text is kept; ``~/.cache/rk-export`` when None.

    Returns:
        int64 (sequences, length), on CPU; `LENGTH` tokens each, fewer if the model's context is shorter. Every
        sequence begins with the start token.

    Raises:
        InputError: If the model is an encoder, names no start token, or gives logits that are not finite.
    """
    start = start_token(source)
    length = min(LENGTH, own_context(source.config))
    sequences = -(-tokens // length)
    dtype = matmul_dtype(device)
    too_large = other is not None and needs_other_writer(source, device)
    key = {
        "version": _VERSION,
        "writer": "int4" if too_large else "dense",
        "weights": source.fingerprint(cache_dir),
        "seed": seed,
        "shape": [sequences, length],
        "start": start,
        "dtype": str(dtype),
    }
    path = cache_file("self-text", key, cache_dir)
    text = (read_tensors(path) or {}).get("tokens")
    if text is None:
        uniforms = torch.rand(sequences, length, generator=torch.Generator().manual_seed(seed))
        ends = _ends(source.config, start)
        if other is not None and too_large:
            text = other(source, uniforms, start, ends)
        else:
            text = sample_text(sampling_model(source, device, dtype), uniforms, start, ends)
        write_tensors(path, {"tokens": text})
    return text


def needs_other_writer(source: Source, device: torch.device) -> bool:
    """Whether a model is too large to write its text itself."""
    return dense_writer_bytes(source, device) > writer_limit(device)


def writer_limit(device: torch.device) -> int:
    """Return the most memory of a model that writes its own text: half of a GPU's, or `DENSE_LIMIT`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1]) // 2
    return DENSE_LIMIT


def dense_writer_bytes(source: Source, device: torch.device) -> int:
    """Return the memory of a model that writes its own text."""
    return source.parameter_count() * matmul_dtype(device).itemsize


def start_token(source: Source) -> int:
    """Return the token that text of a model starts with, and log where it was found.

    That is the beginning-of-sequence token; without one, the decoder's start token, the end-of-sequence token,
    or the tokenizer's first special token.

    Raises:
        InputError: If the model is an encoder, or has none of these.
    """
    config = source.config
    if source.architecture.is_encoder:
        raise InputError(
            f"{config.model_type} is an encoder: it writes no text",
            where="calibration.text",
            fix="choose none, gain or corpus:FILE",
        )
    for name in ("bos_token_id", "decoder_start_token_id", "eos_token_id"):
        if ids := _ids(getattr(config, name, None)):
            logger.info("text starts with token %d (%s)", ids[0], name)
            return ids[0]
    if (special := _first_special(source.folder)) is not None:
        logger.info("text starts with token %d (the tokenizer's first special token)", special)
        return special
    raise InputError(
        "the model names no token that text starts with",
        where=str(source.folder / "config.json"),
        fix="add bos_token_id there, or set calibration.text to a file",
    )


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [int(value)]


def _first_special(folder: Path) -> int | None:
    return next((token["id"] for token in listed_tokens(folder) if token.get("special")), None)


def _ends(config: PretrainedConfig, start: int) -> list[int]:
    """Return the end-of-sequence tokens; one that is the start token too needs none to follow."""
    return [token for token in _ids(config.eos_token_id) if token != start]


def sampling_model(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the dense model with its parameters in `dtype`, for sampling; those of a source in memory are shared.

    A whole float32 copy is not made.
    """
    model = source.description.canonical_model()
    layers = model.get_submodule(source.architecture.layers)
    for layer in source.layers():
        _put(layers.get_submodule(str(layer.index)), layer.module, device, dtype)
    outer = source.skeleton()
    source.load_rest(outer)
    memo: dict[int, object] = {}  # a head that is the embedding stays so
    for path in source.description.outer_paths:
        module = copy.deepcopy(outer.get_submodule(path), memo)
        _cast(module, dtype)
        model.set_submodule(path, module)
    model.to(device)
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_PACKED)
    return model.eval()


def _put(empty: nn.Module, layer: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give an empty layer the parameters of another one."""
    for name, parameter in layer.named_parameters():
        owner, _, leaf = name.rpartition(".")
        values = parameter.data.to(device, dtype)
        setattr(empty.get_submodule(owner), leaf, nn.Parameter(values, requires_grad=False))


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast parameters only: rotary frequencies are buffers and stay in float32."""
    for parameter in module.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def sample_text(model: PreTrainedModel, uniforms: Tensor, start: int, ends: list[int]) -> Tensor:
    """Draw one token for each random number in [0, 1), the first of each sequence excepted.

    Args:
        model: A decoder.
        uniforms: float32 (sequences, length).
        start: First token of each sequence, and the one after an end-of-sequence token.
        ends: The end-of-sequence tokens.

    Returns:
        int64 (sequences, length), on CPU.

    Raises:
        InputError: If logits are not finite.
    """
    at_once = _sequences_at_once(model, uniforms.shape[1])
    with stage("sampling tokens", uniforms.numel()) as bar:
        batches = torch.split(uniforms, at_once)
        return torch.cat([_sample_batch(model, batch, start, ends, bar) for batch in batches])


def _sequences_at_once(model: PreTrainedModel, length: int) -> int:
    config = model.config
    heads = heads_of(config)
    values = 2 * config.num_hidden_layers * heads.kv_heads * heads.head_dim * length
    return max(1, min(_SEQUENCES, _CACHE_BYTES // int(values * model.dtype.itemsize)))


def _sample_batch(model: PreTrainedModel, uniforms: Tensor, start: int, ends: list[int], bar: Bar) -> Tensor:
    sequences, length = uniforms.shape
    device = model.device
    uniforms, ending = uniforms.to(device), torch.tensor(ends, dtype=torch.int64, device=device)
    cache = _cache(model.config, length)
    tokens = torch.full((sequences, length), start, device=device)
    for position in range(1, length):
        last = tokens[:, position - 1]
        logits = model(input_ids=last[:, None], past_key_values=cache, use_cache=True).logits[:, -1]
        drawn = draw(logits, uniforms[:, position])
        tokens[:, position] = torch.where(torch.isin(last, ending), start, drawn)
        bar.advance(sequences)
    bar.advance(sequences)  # the first token of each
    return tokens.cpu()


def _cache(config: PretrainedConfig, length: int) -> Cache:
    """Return a cache of no tokens; a short convolution carries a state instead of keys and values."""
    kinds = getattr(config, "layer_types", None) or ("full_attention",) * config.num_hidden_layers
    return Cache(
        layers=[LinearAttentionLayer() if kind == "conv" else _KeysAndValues(length) for kind in kinds]
    )


def draw(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw from softmax(logits) by inverting the cumulative distribution.

    Args:
        logits: (rows, vocabulary).
        uniforms: float32 (rows,), in [0, 1).

    Returns:
        int64 (rows,); never a token of probability 0.

    Raises:
        InputError: If logits are not finite.
    """
    cumulative = logits.float().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(torch.isfinite(total).all()):
        raise InputError("the model's logits are not finite", fix="verify the model's weights")
    return torch.searchsorted(cumulative, uniforms[:, None] * total, right=True)[:, 0]


class _KeysAndValues(DynamicLayer):
    """Keys and values of one layer in buffers of their final length: nothing is copied as they grow."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self._length = length
        self._buffers: tuple[Tensor, ...] = ()

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self._buffers:
            self.lazy_initialization(keys, values)
            self._buffers = tuple(
                new.new_empty(*new.shape[:2], self._length, new.shape[3]) for new in (keys, values)
            )
        begin = self.get_seq_length()
        end = begin + keys.shape[2]
        for buffer, new in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, begin:end] = new
        self.keys, self.values = (buffer[:, :, :end] for buffer in self._buffers)
        return self.keys, self.values


def _packed_heads(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of one query: the query heads of a key head stand side by side as that head's queries.

    PyTorch's own grouped attention took 4.6 times the processor time of this on CPU in bfloat16 (64 sequences,
    9 query heads on 3 key heads, 128 keys).
    """
    batch, heads, _, width = query.shape
    packed = query.reshape(batch, key.shape[1], -1, width)
    output = nn.functional.scaled_dot_product_attention(
        packed, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(batch, 1, heads, -1), None


AttentionInterface.register(_PACKED, _packed_heads)
AttentionMaskInterface.register(_PACKED, sdpa_mask)

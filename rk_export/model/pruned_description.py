"""The description of a model that lost whole blocks, neurons or key/value heads: an ordinary one of its family."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.model.description import ModelDescription
from rk_export.plan import Pruning

# Fields with a value for every block.
PER_BLOCK = ("layer_types", "no_rope_layers", "attention_layers")
# Fields that list numbers of blocks.
BLOCK_NUMBERS = ("full_attn_idxs",)


def pruned_description(description: ModelDescription, pruning: Pruning) -> ModelDescription:
    """Return the description of what is left.

    Raises:
        InputError: If the family cannot lose it, with the reason.
    """
    check_decoder(description)
    config = description.config
    if pruning.blocks[-1] >= config.num_hidden_layers:
        raise _refusal(f"there is no block {pruning.blocks[-1]}", "pruning", "name blocks of this model")
    pruned = copy.deepcopy(config)
    _keep_blocks(pruned, config, pruning.blocks)
    if pruning.ffn_width is not None:
        _narrow(pruned, description, pruning.ffn_width)
    if pruning.kv_groups:
        _keep_groups(pruned, description, pruning)
    left = replace(description, config=pruned)
    _check_kinds(left, description, pruning)
    return left


def check_decoder(description: ModelDescription) -> None:
    """Refuse an encoder.

    Raises:
        InputError: Says so.
    """
    if description.architecture.is_encoder:
        raise _refusal("an encoder loses no blocks, neurons or heads", "prune", "leave it out")


def _keep_blocks(pruned: Any, config: PretrainedConfig, blocks: tuple[int, ...]) -> None:
    count = config.num_hidden_layers
    pruned.num_hidden_layers = len(blocks)
    for name in PER_BLOCK:
        values = getattr(config, name, None)
        if isinstance(values, list | tuple) and len(values) == count:
            setattr(pruned, name, [values[block] for block in blocks])
    for name in BLOCK_NUMBERS:
        if (numbers := getattr(config, name, None)) is not None:
            setattr(pruned, name, [new for new, block in enumerate(blocks) if block in numbers])
    if hasattr(
        config, "attention_types"
    ):  # GPT-Neo derives the kinds of its blocks from this when it is loaded
        pruned.attention_types = [[[kind], 1] for kind in pruned.attention_layers]


def _narrow(pruned: Any, description: ModelDescription, width: int) -> None:
    config = description.config
    architecture = description.architecture
    if any(architecture.has_experts(config, layer) for layer in range(config.num_hidden_layers)):
        raise _refusal(
            "every expert would need neurons of its own choice, from statistics of its own tokens",
            "prune.ffn_keep",
            "drop it",
        )
    if description.decoder.on_neurons:
        raise _refusal(
            f"{description.decoder.on_neurons} stands behind the neurons: those that stay would change",
            "prune.ffn_keep",
            "drop it",
        )
    if not architecture.width_field:
        raise _refusal(
            "the family ties the number of neurons to the width of the hidden states",
            "prune.ffn_keep",
            "drop it",
        )
    present = description.decoder.intermediate_size
    if width >= present:
        raise _refusal(
            f"{width} neurons are not fewer than {present}", "prune.ffn_keep", "give a smaller share"
        )
    setattr(pruned, architecture.width_field, width)
    for name in architecture.width_switches:
        setattr(pruned, name, False)
    single = replace(description, config=_single_block(pruned, 0))
    if any(matrix.shape[1] != width for matrix in single.matrices if matrix.role == "down"):
        raise _refusal(
            "the family ties the number of neurons to the hidden size", "prune.ffn_keep", "drop it"
        )


def _keep_groups(pruned: Any, description: ModelDescription, pruning: Pruning) -> None:
    heads, kept = description.heads, len(pruning.kv_groups[0])
    if kept >= heads.kv_heads or max(max(groups) for groups in pruning.kv_groups) >= heads.kv_heads:
        raise _refusal(
            f"{kept} key/value heads are not fewer than {heads.kv_heads}", "prune.kv_heads_keep", "keep fewer"
        )
    if description.decoder.sub_norms:
        raise _refusal(
            f"{description.decoder.on_values} stands behind the values: those that stay would change",
            "prune.kv_heads_keep",
            "drop it",
        )
    if description.decoder.query_key_norm == "all":
        raise _refusal(
            "queries and keys are normalized over all heads together, so those that stay would change",
            "prune.kv_heads_keep",
            "drop it",
        )
    if description.decoder.alibi_slopes:
        raise _refusal(
            "how far each head looks back follows from its number, so those that stay would change",
            "prune.kv_heads_keep",
            "drop it",
        )
    if isinstance(getattr(type(pruned), "head_dim", None), property):
        raise _tied_heads()
    pruned.num_attention_heads = heads.heads // heads.kv_heads * kept
    pruned.num_key_value_heads = kept
    pruned.head_dim = heads.head_dim
    attention = description.decoder.attention_layers
    new, old = next(pair for pair in enumerate(pruning.blocks) if pair[1] in attention)
    single = replace(description, config=_single_block(pruned, new))
    shapes = {matrix.role: matrix.shape for matrix in single.matrices}
    width = pruned.num_attention_heads * heads.head_dim
    fits = (shapes["q"][0], shapes["k"][0], shapes["o"][1]) == (width, kept * heads.head_dim, width)
    by_head = description.decoder.query_key_norm == "head"
    if not fits or (by_head and _gains(single, 0) != _gains(description, old)):
        raise _tied_heads()


def _gains(description: ModelDescription, block: int) -> list[tuple[int, ...]]:
    """Return the shapes of a block's vectors that belong to no matrix: gains and shifts of norms."""
    layer = description.layer(block)
    linears = {path for path, module in layer.named_modules() if isinstance(module, nn.Linear)}
    return [
        tuple(tensor.shape)
        for name, tensor in layer.named_parameters()
        if name.rpartition(".")[0] not in linears
    ]


def _single_block(config: PretrainedConfig, block: int) -> PretrainedConfig:
    single = copy.deepcopy(config)
    _keep_blocks(single, config, (block,))
    return single


def _check_kinds(left: ModelDescription, description: ModelDescription, pruning: Pruning) -> None:
    """Refuse a family that derives a block's kind from its number: the wrong kind would be built."""
    wanted = tuple(description.decoder.layers[block] for block in pruning.blocks)
    if left.decoder.layers != wanted:
        raise _refusal(
            f"{description.model_type} derives the kind of a block from its number, so none can go",
            "prune.blocks",
            "drop it",
        )


def _tied_heads() -> InputError:
    return _refusal(
        "the family ties the width of a head to the number of heads", "prune.kv_heads_keep", "drop it"
    )


def _refusal(what: str, where: str, fix: str) -> InputError:
    return InputError(what, where=where, fix=fix)

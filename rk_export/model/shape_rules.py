"""Which dimensions a layer can lose, and why others cannot go."""

from __future__ import annotations

from collections.abc import Sequence

from rk_export.errors import InputError
from rk_export.model.description import ModelDescription
from rk_export.passes.base import Layer
from rk_export.passes.weights.prune_width import mlp_paths
from rk_export.plan import LayerShape, SitePlan


def check_shape(
    description: ModelDescription, layer: Layer, shape: LayerShape, sites: Sequence[SitePlan]
) -> None:
    """Refuse a shape that a layer cannot take.

    Args:
        description: Of the model.
        layer: The dense layer, shapes only.
        shape: What it loses.
        sites: Its sites; they name every matrix of the layer.

    Raises:
        InputError: Says which dimension cannot go and why.
    """
    if description.architecture.is_encoder:
        raise _refusal(shape, "neurons and heads of an encoder are not pruned", "drop its shapes")
    if shape.ffn_width is not None:
        _check_width(description, layer, shape, sites)
    heads, between = description.heads, description.decoder.on_values
    has_attention = layer.index in description.decoder.attention_layers
    if not has_attention and (shape.value_dim, shape.kv_groups) != (None, None):
        raise _refusal(
            shape,
            "value_dim and kv_groups: this layer has a short convolution and no heads",
            "set them to null",
        )
    if between and shape.value_dim is not None:
        raise _refusal(shape, f"value_dim: {between} stands behind the values", "set it to null")
    if shape.value_dim is not None and shape.value_dim >= heads.head_dim:
        raise _refusal(
            shape,
            f"value_dim {shape.value_dim} takes nothing from heads of {heads.head_dim}",
            f"give 1 to {heads.head_dim - 1}, or null",
        )
    if shape.kv_groups is not None:
        _check_groups(description, heads.kv_heads, shape)


def _check_width(
    description: ModelDescription, layer: Layer, shape: LayerShape, sites: Sequence[SitePlan]
) -> None:
    if description.architecture.has_experts(description.config, layer.index):
        raise _refusal(
            shape,
            "ffn_width: every expert would need neurons of its own choice, from statistics of its own tokens",
            "set it to null",
        )
    if description.decoder.on_neurons:
        raise _refusal(
            shape, f"ffn_width: {description.decoder.on_neurons} stands behind the neurons", "set it to null"
        )
    width = layer.linear(mlp_paths(sites)["down"]).in_features
    if (shape.ffn_width or 0) >= width:
        raise _refusal(
            shape,
            f"ffn_width {shape.ffn_width} takes nothing from {width} neurons",
            f"give 1 to {width - 1}, or null",
        )


def _check_groups(description: ModelDescription, groups: int, shape: LayerShape) -> None:
    kept = shape.kv_groups or ()
    if max(kept) >= groups or len(kept) == groups:
        raise _refusal(
            shape,
            f"kv_groups {list(kept)} leaves out none of the groups 0 to {groups - 1}, or names others",
            "list fewer of them, or null",
        )
    if description.decoder.sub_norms:
        raise _refusal(
            shape, f"kv_groups: {description.decoder.on_values} stands behind the values", "set it to null"
        )
    if description.decoder.query_key_norm == "all":
        raise _refusal(
            shape,
            "kv_groups: queries and keys are normalized over all heads together, so those that stay would change",
            "set it to null",
        )


def _refusal(shape: LayerShape, what: str, fix: str) -> InputError:
    return InputError(what, where=f"shapes: layer {shape.layer}", fix=fix)

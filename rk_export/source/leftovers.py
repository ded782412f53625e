"""Stored tensors that a model has no place for: what they tell about the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Sequence

from transformers import PretrainedConfig

from rk_export.errors import InputError
from rk_export.model.families.registry import FAMILIES
from rk_export.model.outputs import classes_of

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h)\.(\d+)\.")
_OTHER_HEADS = re.compile(
    r"(?:^|\.)(score|classifier|classification_head|qa_outputs|v_head|value_head|reward_head|regression_head|"
    r"multiple_choice_head|summary)\."
)
_ADAPTERS = re.compile(
    r"\.(lora_\w+|ia3_l|hada_\w+|oft_\w+|vera_\w+|prompt_embeddings|trainable_tokens_\w+)(?:\.|$)"
)
_QUANTIZED = re.compile(
    r"\.(qweight|qzeros|g_idx|scales|biases|weight_scale\w*|weight_packed|weight_zero_point|input_scale|absmax|"
    r"quant_map|quant_state\.\w+|SCB|weight_format)$"
)
_DECODER_HEADS = ("ForCausalLM", "LMHeadModel")
_WRAPPER_HEADS = ("ForConditionalGeneration", "ForCausalLM", "ForVision2Seq", "ForVisionText2Text")
_ENCODER_HEADS = ("ForMaskedLM", "ForPreTraining", "ForNextSentencePrediction")


def layer_number(name: str) -> int:
    """Return the layer that a tensor belongs to, -1 outside the layers."""
    match = _LAYER.search(name)
    return int(match[1]) if match else -1


def check_kind(config: PretrainedConfig, *, is_wrapper: bool = False) -> None:
    """Refuse a model whose output is not the next token's logits, an encoder's hidden states, or its classifier's.

    Args:
        config: Its `architectures` name the class that the model was saved as.
        is_wrapper: Whether it is a model around the text model that is exported.

    Raises:
        InputError: If it has a head of another kind.
    """
    classes, family = classes_of(config), FAMILIES.get(config.model_type)
    if family is not None and family.classifier(config) is not None:
        return
    is_encoder = family is not None and family.encoder is not None
    heads = _ENCODER_HEADS if is_encoder else _WRAPPER_HEADS if is_wrapper else _DECODER_HEADS
    if not classes or any(any(head in name for head in heads) or is_backbone(name) for name in classes):
        return
    wanted = "hidden states, or classes of texts or tokens," if is_encoder else "logits of the next token"
    raise InputError(
        f"the model is a {classes[0]}: its head is of another kind, and a bundle gives {wanted} only",
        where="config.json: architectures",
        fix="use the language model that it was trained from",
    )


def is_backbone(name: str) -> bool:
    """Whether the name of a class is that of a model without a head, such as `LlamaModel`."""
    return name.endswith("Model") and not any(part in name for part in ("Reward", "LMHead"))


def no_place(leftovers: Sequence[str], config: PretrainedConfig, where: str) -> InputError:
    """Return the message about stored tensors that the model does not have.

    Args:
        leftovers: Their names as they are stored, at least one.
        config: Of the model.
        where: Where the first one lies.
    """
    names = ", ".join(leftovers[:4]) + (f" and {len(leftovers) - 4} more" if leftovers[4:] else "")
    layers, count = max(map(layer_number, leftovers)) + 1, int(config.num_hidden_layers)
    if layers > count:
        return InputError(
            f"the files hold {layers} layers, config.json says {count} (num_hidden_layers): {names}",
            where=where,
            fix="config.json and the weights do not belong together: take both from the same model",
        )
    quantization = getattr(config, "quantization_config", None)
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    how = (
        "but nothing in config.json says how to read them"
        if method is None
        else f"by {method}, which is not read"
    )
    for pattern, what, fix in (
        (
            _ADAPTERS,
            "tensors of an adapter that is not merged",
            "merge it first (merge_and_unload), or save the adapter alone and give --base MODEL",
        ),
        (
            _QUANTIZED,
            f"tensors of a quantized model, {how}",
            "use the original model" if method else "use the original model, or restore quantization_config",
        ),
        (
            _OTHER_HEADS,
            "a head of another kind (classification, reward, question answering)",
            _head_fix(config),
        ),
    ):
        if found := [name for name in leftovers if pattern.search(name)]:
            shown = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if found[4:] else "")
            return InputError(f"{what}: {shown}", where=where, fix=fix)
    return InputError(
        f"{len(leftovers)} tensors have no place in a {config.model_type} model of this config: {names}",
        where=where,
        fix="config.json and the weights do not belong together, or the model has parts that would be dropped",
    )


def _head_fix(config: PretrainedConfig) -> str:
    family, fix = FAMILIES.get(config.model_type), "use the language model that it was trained from"
    if family is None or (family.sequence is None and family.tokens is None):
        return fix
    known = "...ForSequenceClassification or ...ForTokenClassification"
    return f"name the class of a classifier, {known}, in architectures of config.json; else {fix}"


def missing(
    absent: Sequence[str], present: Sequence[str], config: PretrainedConfig, head: str | None, where: str
) -> InputError:
    """Return the message about parameters that the files do not hold.

    Args:
        absent: Names of the parameters, at least one.
        present: Names of those that are there.
        config: Of the model.
        head: Name of the output projection's matrix; None for encoders.
        where: The model folder.
    """
    layers, count = max(map(layer_number, present), default=-1) + 1, int(config.num_hidden_layers)
    if 0 < layers < count and all(layer_number(name) >= layers for name in absent):
        return InputError(
            f"config.json says {count} layers (num_hidden_layers), the files hold {layers}: no {absent[0]}",
            where=where,
            fix="config.json and the weights do not belong together: take both from the same model",
        )
    if list(absent) == [head]:
        return InputError(
            f"no output projection: tensor {head!r} is missing, and config.json does not tie it to the embedding",
            where=where,
            fix="save the whole model (AutoModelForCausalLM), not its backbone; set tie_word_embeddings to true "
            "only if the model was trained so",
        )
    more = f", and {len(absent) - 1} more" if absent[1:] else ""
    return InputError(
        f"tensor {absent[0]!r} is missing{more}",
        where=where,
        fix="the checkpoint is incomplete: download it again",
    )

"""Tiny encoder bundles with random weights for the runtime's tests: vectors of their own, classifiers, prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from runtime_models import byte_tokenizer, write_encoder
from tokenizers import processors

WIDTH, LABELS = 8, ("no", "yes", "maybe")


def write_embedding_model(folder: Path, *, normalizes: bool = True, **settings: Any) -> Path:
    """Write a bundle whose ``sentence_embedding`` is the largest state of each element, scaled to length 1 or not.

    Args:
        folder: The bundle's, made by this.
        normalizes: The last module scales to length 1.
        settings: Of ``config_sentence_transformers.json``.
    """
    write_encoder(folder)
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    graph.node.append(helper.make_node("ReduceMax", ["last_hidden_state", "axis"], ["pooled"], keepdims=0))
    scaled = helper.make_node("LpNormalization", ["pooled"], ["sentence_embedding"], axis=1)
    plain = helper.make_node("Identity", ["pooled"], ["sentence_embedding"])
    graph.node.append(scaled if normalizes else plain)
    shape = ["B", WIDTH]
    graph.output.append(helper.make_tensor_value_info("sentence_embedding", TensorProto.FLOAT, shape))
    onnx.save(model, folder / "model.onnx")
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalizes else [])]
    _write(folder / "modules.json", [{"type": f"sentence_transformers.models.{name}"} for name in modules])
    if settings:
        _write(folder / "config_sentence_transformers.json", settings)
    return folder


def write_classifier(folder: Path, *, by_token: bool = False, labels: int = 3, **config: Any) -> Path:
    """Write a bundle whose logits depend on the tokens and on their types.

    Args:
        folder: The bundle's, made by this.
        by_token: Logits for each token; else for the text.
        labels: How many.
        config: More fields of ``config.json``.
    """
    write_encoder(folder)
    model = onnx.load(folder / "model.onnx")
    graph = model.graph
    head = np.random.default_rng(1).standard_normal((WIDTH, labels)).astype(np.float32)
    graph.initializer.append(numpy_helper.from_array(head, "head"))
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "axis"))
    graph.initializer.append(numpy_helper.from_array(np.array([2]), "last_axis"))
    graph.node.extend(
        [
            helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["types", "last_axis"], ["typed"]),
            helper.make_node("Add", ["last_hidden_state", "typed"], ["states"]),
            helper.make_node("MatMul", ["states", "head"], ["logits" if by_token else "each"]),
        ]
    )
    if not by_token:  # the sum over tokens without padding
        mask = next(node for node in graph.node if node.op_type == "Unsqueeze" and "Cast" in node.input[0])
        graph.node.append(helper.make_node("Mul", ["each", mask.output[0]], ["shown"]))
        graph.node.append(helper.make_node("ReduceSum", ["shown", "axis"], ["logits"], keepdims=0))
    types = helper.make_tensor_value_info("token_type_ids", TensorProto.INT64, ["B", "S"])
    graph.input.append(types)
    del graph.output[:]
    shape = ["B", "S", labels] if by_token else ["B", labels]
    graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    onnx.save(model, folder / "model.onnx")
    named = {str(index): name for index, name in enumerate(LABELS[:labels])}
    _write(folder / "config.json", {"max_position_embeddings": 16, "id2label": named, **config})
    tokenizer = byte_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <eos>:1 $B:1", special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")

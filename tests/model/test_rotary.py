"""Rotary tables that the graph computes: those of transformers, at every position, in a few bytes of the file."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from rope_configs import DYNAMIC, LINEAR, LLAMA3, LONGROPE, YARN
from tiny_models import tiny_config
from transformers import PretrainedConfig

from rk_export.graph.dense.frontend import build_module, trace
from rk_export.model.description import describe
from rk_export.model.torch_models import empty_model

POSITIONS = 131_072
ULP = np.finfo(np.float32).eps
GEMMA3 = {
    "full_attention": {**LINEAR, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
SCALINGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": DYNAMIC}),
    ("qwen3", {}),
    ("gemma3", {"rope_parameters": GEMMA3}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 17}),
]


def traced(config: PretrainedConfig, ep: str = "cpu", **options: Any) -> ir.Model:
    dtype = "fp32" if ep == "cpu" else "fp16"
    return trace(build_module(describe(config), ep=ep, dtype=dtype, **options))  # type: ignore[arg-type]


def tables_of(model: ir.Model, tokens: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Return layer -> cosines and sines that its attention reads for a sequence of `tokens`; weights stay unread."""
    attention = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    wanted = {index: (node.inputs[7], node.inputs[8]) for index, node in enumerate(attention)}
    values = list({value.name: value for pair in wanted.values() for value in pair if value}.values())
    inputs = [value for value in model.graph.inputs if value.name == "attention_mask"]
    part = ir.convenience.extract(model.graph, inputs=inputs, outputs=values)
    body = ir.Model(part, ir_version=10)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    session = ort.InferenceSession(ir.serde.serialize_model(body).SerializeToString(), settings)
    feed = {"attention_mask": np.ones((1, tokens), np.int64)} if session.get_inputs() else {}
    found = dict(zip([value.name for value in values], session.run(None, feed), strict=True))
    return {index: tuple(found[value.name] for value in pair if value) for index, pair in wanted.items()}  # type: ignore[misc]


def transformers_tables(config: PretrainedConfig, layer: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    module = empty_model(config).get_submodule("model.rotary_emb")
    module = type(module)(config=config)  # the skeleton's buffers lie on the meta device
    by_type = "rope_type" not in config.rope_parameters
    layer_type = {"layer_type": config.layer_types[layer]} if by_type else {}
    cos, sin = module(torch.zeros(1), torch.arange(tokens)[None], **layer_type)
    half = cos.shape[-1] // 2
    return cos[0, :, :half].numpy(), sin[0, :, :half].numpy()


@pytest.mark.parametrize(("family", "options"), SCALINGS)
def test_every_row_is_that_of_transformers(family: str, options: dict[str, Any]) -> None:
    config = tiny_config(family, max_position_embeddings=POSITIONS, **options)
    for layer, found in tables_of(traced(config), POSITIONS).items():
        for actual, expected in zip(found, transformers_tables(config, layer, POSITIONS), strict=True):
            assert actual.shape == expected.shape
            assert np.abs(actual - expected).max() <= 2 * ULP * np.abs(expected).max()


def test_short_sequences_of_longrope_have_their_own_rows() -> None:
    config = tiny_config("phi3", rope_parameters=LONGROPE, original_max_position_embeddings=17)
    model = traced(config)
    for tokens in (3, 17, 18, 40):
        found = tables_of(model, tokens)[0]
        for actual, expected in zip(found, transformers_tables(config, 0, tokens), strict=True):
            np.testing.assert_allclose(actual[:tokens], expected, atol=2 * ULP * np.abs(expected).max())


def test_half_precision_rounds_the_tables_not_the_angles() -> None:
    config = tiny_config("llama", max_position_embeddings=POSITIONS)
    found = tables_of(traced(config, "portable"), POSITIONS)[0]
    for actual, expected in zip(found, transformers_tables(config, 0, POSITIONS), strict=True):
        assert actual.dtype == np.float16
        assert np.abs(actual - expected).max() <= np.finfo(np.float16).eps


@pytest.mark.parametrize(("ep", "context"), [("cpu", 512), ("cpu", POSITIONS), ("portable", POSITIONS)])
def test_the_file_holds_frequencies_and_no_tables(ep: str, context: int) -> None:
    model = traced(tiny_config("llama", max_position_embeddings=context), ep)
    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    assert sum(value.const_value.nbytes for value in values) < 1024  # type: ignore[union-attr]


def test_the_tables_may_have_other_lengths_than_the_config_says() -> None:
    config = tiny_config("llama")
    assert tables_of(traced(config, positions=300), 300)[0][0].shape == (300, 8)
    assert tables_of(traced(config, positions=100), 100)[0][0].shape == (100, 8)

"""The vector of a text in the graph: every mode of pooling and every module, against their definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from sentence_models import IDENTITY, write_modules
from transformers import BertConfig

from rk_export.graph.sentence import add_sentence_embedding
from rk_export.model.sentence_modules import MODES
from rk_export.parity.sentence_tier import sentence_vector
from rk_export.source.sentence_head import SentenceHead, read_sentence_head

HIDDEN, LENGTHS = 16, (7, 1, 4)
TANH = "torch.nn.modules.activation.Tanh"


def a_head(folder: Path, **stated: Any) -> SentenceHead:
    write_modules(folder, HIDDEN, **stated)
    head = read_sentence_head(folder, BertConfig(hidden_size=HIDDEN, num_attention_heads=2))
    assert head is not None
    return head


def vectors(head: SentenceHead, states: np.ndarray, mask: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """Return what a graph makes of given hidden states."""
    kind = ir.DataType.from_numpy(np.dtype(dtype))
    given = ir.val("states", kind, ["batch", "length", HIDDEN])
    marks = ir.val("attention_mask", ir.DataType.INT64, ["batch", "length"])
    node = ir.node("Identity", [given])
    node.outputs[0].name, node.outputs[0].type = "last_hidden_state", ir.TensorType(kind)
    node.outputs[0].shape = given.shape
    graph = ir.Graph([given, marks], node.outputs, nodes=[node], opset_imports={"": 21}, name="states")
    model = ir.Model(graph, ir_version=10)
    add_sentence_embedding(model, head)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    assert session.get_outputs()[1].shape == ["batch", head.modules.width]
    feeds = {"states": states.astype(dtype), "attention_mask": mask}
    (found,) = session.run(["sentence_embedding"], feeds)
    assert found.dtype == np.float32
    return np.asarray(found)


def check(head: SentenceHead, dtype: Any = np.float32, tolerance: float = 2e-6) -> None:
    """Compare a batch, padded on either side with states that would be seen, with each text alone."""
    generator = np.random.default_rng(0)
    longest = max(LENGTHS)
    for side in ("right", "left"):
        states = generator.standard_normal((len(LENGTHS), longest, HIDDEN)).astype(dtype)
        mask, expected = np.zeros((len(LENGTHS), longest), np.int64), []
        for row, length in enumerate(LENGTHS):
            shown = slice(0, length) if side == "right" else slice(longest - length, longest)
            mask[row, shown] = 1
            states[row, mask[row] == 0] = 9.0
            expected.append(sentence_vector(head, torch.from_numpy(states[row, shown]).float()).numpy())
        found = vectors(head, states, mask, dtype)
        np.testing.assert_allclose(found, np.stack(expected), atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_of_pooling(tmp_path: Path, mode: str) -> None:
    check(a_head(tmp_path, pooling={"pooling_mode": mode}, steps=()))


def test_the_modes_differ(tmp_path: Path) -> None:
    states = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
    found = [
        sentence_vector(a_head(tmp_path / mode, pooling={"pooling_mode": mode}, steps=()), states)
        for mode in MODES
    ]
    for index, one in enumerate(found):
        assert all((one - other).abs().max() > 0.05 for other in found[:index])


def test_several_modes_are_joined_in_the_order_of_their_flags(tmp_path: Path) -> None:
    head = a_head(tmp_path, pooling={"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True})
    assert head.modules.pooling == ("cls", "max")
    assert head.modules.width == 2 * HIDDEN
    check(head)


def test_several_modes_are_joined_in_the_order_of_a_list(tmp_path: Path) -> None:
    head = a_head(tmp_path, pooling={"pooling_mode": ["max", "mean"]})
    assert head.modules.pooling == ("max", "mean")
    check(head)


@pytest.mark.parametrize("name", ["Tanh", "ReLU", "Sigmoid", "GELU", "SiLU"])
def test_activations_of_dense_layers(tmp_path: Path, name: str) -> None:
    check(a_head(tmp_path, steps=({"activation_function": f"torch.nn.modules.activation.{name}"},)))


def test_dense_layers_as_embedding_gemma_has_them(tmp_path: Path) -> None:
    steps = ({"out_features": 48, "bias": False}, {"out_features": HIDDEN, "bias": False}, "Normalize")
    check(a_head(tmp_path, steps=steps))


@pytest.mark.parametrize("out", [HIDDEN, 24])
def test_a_residual_beside_a_dense_layer(tmp_path: Path, out: int) -> None:
    check(a_head(tmp_path, steps=({"out_features": out, "use_residual": True, "activation_function": TANH},)))


def test_a_norm_and_dropout(tmp_path: Path) -> None:
    check(a_head(tmp_path, steps=("Dropout", "LayerNorm", "Normalize")))


def test_half_precision_states_are_summed_in_single_precision(tmp_path: Path) -> None:
    check(a_head(tmp_path), np.float16)


def test_a_row_without_tokens_is_a_vector_of_zeros(tmp_path: Path) -> None:
    states = np.ones((1, 3, HIDDEN), np.float32)
    found = vectors(a_head(tmp_path), states, np.zeros((1, 3), np.int64))
    np.testing.assert_array_equal(found, np.zeros((1, HIDDEN), np.float32))


def test_a_known_vector(tmp_path: Path) -> None:
    """The mean of (1, 0 …) and (0, 1 …) has equal parts, and length 1 behind Normalize."""
    states = np.zeros((1, 2, HIDDEN), np.float32)
    states[0, 0, 0] = states[0, 1, 1] = 1.0
    (found,) = vectors(a_head(tmp_path), states, np.ones((1, 2), np.int64))
    np.testing.assert_allclose(found[:3], [0.5**0.5, 0.5**0.5, 0.0], atol=1e-7)


def test_the_default_activation_is_tanh(tmp_path: Path) -> None:
    write_modules(tmp_path, HIDDEN, steps=({"activation_function": IDENTITY},))
    path = tmp_path / "2_Dense" / "config.json"
    path.write_text(
        path.read_text(encoding="utf-8").replace(f'"activation_function": "{IDENTITY}"', '"x": 0')
    )
    head = read_sentence_head(tmp_path, BertConfig(hidden_size=HIDDEN, num_attention_heads=2))
    assert head is not None
    check(head)
    assert "Tanh" in str(head.modules.steps)

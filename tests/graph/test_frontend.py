"""Dense graphs against PyTorch: every family, prefill and cached decode, options, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from mobius.components import Linear
from rope_configs import LINEAR, LLAMA3, LONGROPE, YARN
from tiny_models import DECODERS, FAMILIES, tiny_config, tiny_model
from transformers import DynamicCache, PreTrainedModel

from rk_export.errors import InputError, UnsupportedModelError
from rk_export.graph.dense.frontend import build_module, check_supported, rename_weights, trace
from rk_export.model.description import describe
from rk_export.model.families.registry import architecture_of, heads_of

Array = npt.NDArray[Any]
FP32_BOUND = 1e-4  # of the largest logit
LENGTH = 24
# Tokens a call: GroupQueryAttention takes several tokens after a cache for one row only.
ONE_BY_ONE, IN_CHUNKS = (14,) + (1,) * 10, (7, 3, 1, 1, 4, 1, 1, 6)

SLIDING = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
BIASES = {"attention_bias": True, "mlp_bias": True}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": LINEAR}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {**BIASES, "tie_word_embeddings": True}),
    ("llama", {"head_dim": 32, "hidden_act": "gelu"}),
    ("llama", {"num_key_value_heads": 1, "hidden_act": "gelu_new"}),
    ("qwen2", SLIDING),
    ("qwen3", {**SLIDING, "attention_bias": True, "tie_word_embeddings": True}),
    ("gemma2", {"tie_word_embeddings": False, "attention_bias": True}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    (
        "gemma3",
        {
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "final_logit_softcapping": 6.0,
        },
    ),
    ("phi3", {"sliding_window": 6}),
    (
        "phi3",
        {
            "hidden_size": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 17}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    ("olmo2", {"attention_bias": True}),
    (
        "olmo3",
        {"rope_parameters": {**LINEAR, "full_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    ),
    ("gemma2", {"hidden_act": "relu", "hidden_activation": "silu"}),
    ("granite", {**BIASES, "tie_word_embeddings": True}),
    ("smollm3", {**BIASES, "tie_word_embeddings": False}),
    ("smollm3", SLIDING),
    ("starcoder2", {"use_bias": False, "sliding_window": 4, "tie_word_embeddings": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": False, "n_inner": None}),
    ("opt", {"enable_bias": False, "tie_word_embeddings": False}),
    ("mixtral", {"sliding_window": 4, "head_dim": 32}),
    ("qwen3_moe", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    ("qwen3_moe", {"mlp_only_layers": [0], "attention_bias": True}),
    ("qwen3_moe", {"decoder_sparse_step": 2, **SLIDING}),
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: on tiny matrices more of them only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Pair:
    """A PyTorch model and the session of its exported graph."""

    model: PreTrainedModel
    graph: ir.Graph
    session: ort.InferenceSession

    @property
    def inputs(self) -> dict[str, Any]:
        return {value.name: value for value in self.session.get_inputs()}

    def run(self, ids: Array, mask: Array, past: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
        feed = {"input_ids": ids, "attention_mask": mask, **past}
        if "position_ids" in self.inputs:
            feed["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        names = [value.name for value in self.session.get_outputs()]
        outputs = dict(zip(names, self.session.run(names, feed), strict=True))
        logits = outputs.pop("logits").astype(np.float32)
        return logits, {name.replace("present", "past_key_values"): v for name, v in outputs.items()}

    def decode(self, ids: Array, steps: tuple[int, ...]) -> Array:
        """Return the logits of all tokens, fed ``steps`` tokens a call."""
        past, parts, done = self.empty_past(len(ids)), [], 0
        for step in steps:
            mask = np.ones((len(ids), done + step), np.int64)
            logits, past = self.run(ids[:, done : done + step], mask, past)
            parts.append(logits)
            done += step
        return np.concatenate(parts, axis=1)

    def empty_past(self, batch: int) -> dict[str, Array]:
        dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        return {
            name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtypes[value.type])
            for name, value in self.inputs.items()
            if name.startswith("past_key_values")
        }


def export(model: PreTrainedModel, ep: str = "cpu", dtype: str = "fp32") -> Pair:
    onnx_module = build_module(describe(model.config), ep=ep, dtype=dtype)  # type: ignore[arg-type]
    graph_model = trace(onnx_module)
    torch_model = copy.deepcopy(model)
    for layer in torch_model.get_submodule(onnx_module.architecture.layers):
        onnx_module.architecture.canonicalize(layer)
    weights = rename_weights(onnx_module, torch_model.state_dict())
    for name, value in graph_model.graph.initializers.items():
        if value.const_value is None:
            tensor = weights.pop(name).detach().to(torch.float32 if dtype == "fp32" else torch.float16)
            value.const_value = ir.tensor(tensor.contiguous().numpy(), name=name)
    assert not weights, "tensors that the graph does not use"
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    serialized = ir.serde.serialize_model(graph_model).SerializeToString()
    session = ort.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    return Pair(model, graph_model.graph, session)


@cache
def exported(family: str) -> Pair:
    return export(tiny_model(family))


def tokens(batch: int = 2, length: int = LENGTH) -> Array:
    return np.random.default_rng(0).integers(3, 160, (batch, length))


def reference(model: PreTrainedModel, ids: Array, **inputs: Array) -> Array:
    with torch.no_grad():
        out = model(torch.from_numpy(ids), **{name: torch.from_numpy(v) for name, v in inputs.items()})
    return out[0].float().numpy()


def reference_decode(model: PreTrainedModel, ids: Array, steps: tuple[int, ...]) -> Array:
    cache, parts = DynamicCache(config=model.config), []
    for chunk in torch.split(torch.from_numpy(ids), list(steps), dim=1):
        with torch.no_grad():
            parts.append(model(chunk, past_key_values=cache, use_cache=True).logits.numpy())
    return np.concatenate(parts, axis=1)


def assert_close(actual: Array, expected: Array, bound: float = FP32_BOUND) -> None:
    scale = np.abs(expected).max()
    assert expected.std() > 0.1 * scale, "flat logits prove nothing"
    assert np.abs(actual - expected).max() <= bound * scale


def assert_parity(pair: Pair) -> None:
    ids = tokens()
    whole, _ = pair.run(ids, np.ones_like(ids), pair.empty_past(len(ids)))
    assert_close(whole, reference(pair.model, ids))
    assert_close(pair.decode(ids, ONE_BY_ONE), reference_decode(pair.model, ids, ONE_BY_ONE))
    assert_close(pair.decode(ids[:1], IN_CHUNKS), reference_decode(pair.model, ids[:1], IN_CHUNKS))


@pytest.mark.parametrize("family", DECODERS)
def test_decoder_equals_pytorch(family: str) -> None:
    assert_parity(exported(family))


@pytest.mark.parametrize(("family", "options"), VARIANTS)
def test_options_that_change_the_logits(family: str, options: dict[str, Any]) -> None:
    model = tiny_model(family, **options)
    changed = np.abs(reference(model, tokens()) - reference(tiny_model(family), tokens())).max()
    assert changed > 0.01, "the option has no effect on this model"
    assert_parity(export(model))


@pytest.mark.parametrize("family", DECODERS)
def test_right_padding_does_not_change_the_other_tokens(family: str) -> None:
    pair, ids, mask = exported(family), tokens(), np.ones((2, LENGTH), np.int64)
    mask[1, 15:] = 0
    logits, _ = pair.run(ids, mask, pair.empty_past(2))
    expected = reference(pair.model, ids)
    assert_close(logits[mask == 1], expected[mask == 1])


def test_encoder_equals_pytorch_on_a_padded_batch() -> None:
    pair, ids = exported("bert"), tokens()
    mask, types = np.ones_like(ids), np.random.default_rng(1).integers(0, 2, ids.shape)
    mask[1, 15:] = 0
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    (actual,) = pair.session.run(["last_hidden_state"], feed)
    expected = reference(pair.model, ids, attention_mask=mask, token_type_ids=types)
    assert_close(actual[mask == 1], expected[mask == 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_portable_fp16_rounds_no_worse_than_pytorch_in_fp16(family: str) -> None:
    model, ids = tiny_model(family), tokens()
    expected, rounded = reference(model, ids), reference(copy.deepcopy(model).half(), ids)
    pair = export(model, "portable", "fp16")
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    if family == "bert":
        (actual,) = pair.session.run(None, {**feed, "token_type_ids": np.zeros_like(ids)})
    else:
        actual = pair.decode(ids, ONE_BY_ONE)
    noise = np.abs(rounded - expected).max() / np.abs(expected).max()
    assert noise < 0.05
    assert_close(actual.astype(np.float32), expected, bound=2.5 * noise)


@pytest.mark.parametrize("family", DECODERS)
def test_graph_contract(family: str) -> None:
    pair = exported(family)
    count, heads = (
        pair.model.config.num_hidden_layers,
        heads_of(pair.model.config),
    )
    cache = [f"{i}.{kind}" for i in range(count) for kind in ("key", "value")]
    positions = ["position_ids"] if family in ("gpt2", "opt") else []
    names = ["input_ids", "attention_mask", *positions, *(f"past_key_values.{name}" for name in cache)]
    assert list(pair.inputs) == names
    outputs = {value.name: value.shape for value in pair.session.get_outputs()}
    assert list(outputs) == ["logits", *(f"present.{name}" for name in cache)]
    assert outputs["present.0.key"][1::2] == [heads.kv_heads, heads.head_dim]
    attention = [node for node in pair.graph if "Attention" in node.op_type]
    assert [node.op_type for node in attention] == ["GroupQueryAttention"] * count


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_are_linears_of_the_same_shape_in_the_module_tree(family: str) -> None:
    model = tiny_model(family)
    architecture = architecture_of(model.config)
    onnx_module = build_module(describe(model.config), ep="cpu", dtype="fp32")
    modules = dict(onnx_module.module.named_modules())
    assert {architecture.onnx_embedding, architecture.onnx_lm_head or architecture.onnx_embedding} <= set(
        modules
    )
    for index, layer in enumerate(model.get_submodule(architecture.layers)):
        architecture.canonicalize(layer)
        for projection in architecture.projections(model.config, index):
            linear = modules[f"{architecture.onnx_layers}.{index}.{projection.onnx_path}"]
            assert isinstance(linear, Linear)
            assert tuple(linear.weight.shape) == tuple(layer.get_submodule(projection.path).weight.shape)


def test_a_tied_head_is_stored_once() -> None:
    names = export(tiny_model("llama", tie_word_embeddings=True)).graph.initializers
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": {**LINEAR, "rope_type": "proportional"}}, "scaling 'proportional'"),
    ("llama", {"head_dim": 20}, "multiples of 8"),
    ("llama", {"num_key_value_heads": 3}, "whole groups of heads"),
    ("llama", {"is_causal": False}, "is_causal=False"),
    ("llama", {"hidden_act": "mish"}, "activation 'mish'"),
    ("gpt2", {"hidden_size": 48}, "multiples of 8"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
    ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32"),
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    (
        "granitemoehybrid",
        {"layer_types": ["linear_attention", "full_attention"]},
        "1 of 2 layer_types are 'linear_attention'",
    ),
    ("granitemoehybrid", {"num_local_experts": 4}, "num_local_experts=4"),
    ("bert", {"is_decoder": True}, "is_decoder=True"),
    ("bert", {"hidden_act": "mish"}, "activation 'mish'"),
]


@pytest.mark.parametrize(("family", "options", "reason"), REFUSALS)
def test_what_would_not_be_exact_is_refused_with_the_reason(
    family: str, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        check_supported(describe(tiny_config(family, **options)), ep="cpu", dtype="fp32")


@pytest.mark.parametrize(
    ("ep", "dtype"), [("cpu", "fp16"), ("cuda", "fp32"), ("portable", "fp32"), ("dml", "fp16")]
)
def test_a_dtype_without_kernels_is_refused(ep: str, dtype: str) -> None:
    with pytest.raises(
        UnsupportedModelError, match=f"no export in {dtype} for the execution provider '{ep}'"
    ):
        check_supported(describe(tiny_config("llama")), ep=ep, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("ep", "dtype"), [("cpu", "fp32"), ("cuda", "fp16"), ("portable", "fp16")])
def test_every_family_is_supported_everywhere(family: str, ep: str, dtype: str) -> None:
    check_supported(describe(tiny_config(family)), ep=ep, dtype=dtype)


def test_a_tensor_of_another_model_is_refused() -> None:
    onnx_module = build_module(describe(tiny_config("llama")), ep="cpu", dtype="fp32")
    with pytest.raises(InputError, match=r"'score\.weight' is not a tensor of the family 'llama'"):
        rename_weights(onnx_module, {"score.weight": torch.zeros(2, 64)})

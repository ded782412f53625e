"""Tiny bundles with random weights for the runtime's tests: byte-level tokenizer, two-layer decoder."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from rk_export.runtime.engine.slots import SlotRunner

BOS, EOS, VOCAB = 256, 257, 258
HEADS, KV_HEADS, HEAD, LAYERS, CONTEXT = 4, 2, 16, 2, 96
HIDDEN = HEADS * HEAD
TAPS = 3  # of a short convolution

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}\n"
    "    {% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}\n"
    "[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@dataclass
class _Graph:
    """Collects nodes and initializers while a graph is written down."""

    rng: np.random.Generator
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)

    def op(
        self, kind: str, inputs: list[str], *, outputs: int = 1, domain: str = "", **attributes: Any
    ) -> Any:
        names = [f"{kind}_{len(self.nodes)}_{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, value: Any, dtype: Any = np.int64, name: str | None = None) -> str:
        name = name or f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def weight(self, *shape: int, scale: float = 0.3) -> str:
        return self.constant(self.rng.standard_normal(shape) * scale, np.float32)

    def rename(self, old: str, new: str) -> None:
        for node in self.nodes:
            for index, name in enumerate(node.output):
                if name == old:
                    node.output[index] = new


@dataclass(frozen=True)
class TinyDecoder:
    """Which form of decoder graph to write.

    Args:
        grouped: ``GroupQueryAttention`` with rotary positions, or else attention in plain operators, without.
        lengths: What ``GroupQueryAttention`` is told of a row's length: ``row``, its own, from any mask, as we export
            it; ``sum``, its own, from the ones of its mask, as GenAI's builder does; ``total``, the longest of
            all.
        logits_start: The graph has the overridable initializer of that name.
        quantized_head: The output matrix is a ``MatMulNBits``.
        external: Weights lie in ``model.onnx.data``.
        seed: Seed of the weights.
        context: Positions that the model has.
        states: Short convolutions behind the layers with attention; each carries a state of `TAPS` tokens.
    """

    grouped: bool = True
    lengths: Literal["row", "sum", "total"] = "row"
    logits_start: bool = True
    quantized_head: bool = False
    external: bool = False
    seed: int = 0
    context: int = CONTEXT
    states: int = 0

    def write(
        self, folder: Path, *, eos: int | list[int] = EOS, shared: bool | None = None, tokenizer: bool = True
    ) -> Path:
        """Write a bundle folder and return it; ``shared`` goes into the manifest unless it is None."""
        folder.mkdir(parents=True, exist_ok=True)
        onnx.save(
            self.model(),
            str(folder / "model.onnx"),
            save_as_external_data=self.external,
            location="model.onnx.data",
            size_threshold=1024,
        )
        config = {"max_position_embeddings": self.context, "vocab_size": VOCAB, "head_dim": HEAD}
        _write_json(folder / "config.json", config)
        _write_json(folder / "generation_config.json", {"eos_token_id": eos})
        _write_json(
            folder / "tokenizer_config.json", {"bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}
        )
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        if shared is not None:
            _write_json(folder / "rk_manifest.json", {"shared_kv_cache": shared})
        if tokenizer:
            byte_tokenizer().save(str(folder / "tokenizer.json"))
        return folder

    def model(self) -> Any:
        """Return the ``onnx.ModelProto``."""
        graph = _Graph(np.random.default_rng(self.seed))
        attend = _grouped_attention(graph, self) if self.grouped else _plain_attention(graph)
        x = graph.op("Gather", [graph.weight(VOCAB, HIDDEN, scale=1.0), "input_ids"])
        for layer in range(LAYERS):
            o = graph.op("MatMul", [attend(layer, x), graph.weight(HIDDEN, HIDDEN)])
            x = graph.op("Add", [x, graph.op("Tanh", [o])])
        for layer in range(LAYERS, LAYERS + self.states):
            x = graph.op("Add", [x, _short_convolution(graph, layer, x)])
        if self.logits_start:
            start = graph.constant([0], name="logits_start")
            x = graph.op("Slice", [x, start, graph.constant([2**62]), graph.constant([1])])
        graph.rename(self._head(graph, x), "logits")
        return self._finish(graph)

    def _head(self, graph: _Graph, x: str) -> str:
        if not self.quantized_head:
            return str(graph.op("MatMul", [x, graph.weight(HIDDEN, VOCAB)]))
        packed = graph.constant(graph.rng.integers(256, size=(VOCAB, HIDDEN // 32, 16)), np.uint8)
        scales = graph.constant(graph.rng.random((VOCAB, HIDDEN // 32)) * 0.1, np.float32)
        attributes = {"K": HIDDEN, "N": VOCAB, "bits": 4, "block_size": 32, "accuracy_level": 4}
        return str(graph.op("MatMulNBits", [x, packed, scales], domain="com.microsoft", **attributes))

    def _finish(self, graph: _Graph) -> Any:
        tensor = helper.make_tensor_value_info
        integer, real = TensorProto.INT64, TensorProto.FLOAT
        cache = [(f"{layer}.{side}") for layer in range(LAYERS) for side in ("key", "value")]
        inputs = [tensor("input_ids", integer, ["B", "S"]), tensor("attention_mask", integer, ["B", "T"])]
        inputs += [tensor(f"past_key_values.{name}", real, ["B", KV_HEADS, "P", HEAD]) for name in cache]
        states = [str(layer) for layer in range(LAYERS, LAYERS + self.states)]
        inputs += [tensor(f"past_conv.{layer}", real, ["B", HIDDEN, TAPS]) for layer in states]
        if self.logits_start:
            inputs.append(tensor("logits_start", integer, [1]))
        outputs = [tensor("logits", real, ["B", "N", VOCAB])]
        outputs += [tensor(f"present.{name}", real, ["B", KV_HEADS, "Q", HEAD]) for name in cache]
        outputs += [tensor(f"present_conv.{layer}", real, ["B", HIDDEN, TAPS]) for layer in states]
        body = helper.make_graph(graph.nodes, "tiny", inputs, outputs, graph.initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(body, opset_imports=opsets, ir_version=10)


def held_up(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.02) -> None:
    """Make every step of the engine take a while, so that requests pile up."""
    step = SlotRunner.step

    def slow(self: SlotRunner, *given: Any) -> np.ndarray:
        time.sleep(seconds)
        return step(self, *given)

    monkeypatch.setattr(SlotRunner, "step", slow)


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte (token = byte), ``<bos>`` put in front, and ``<eos>``."""
    letters = {letter: index for index, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab={**letters, "<bos>": BOS, "<eos>": EOS}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<bos>", "<eos>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer


def write_encoder(folder: Path) -> Path:
    """Write an encoder bundle whose hidden state is the embedding of each token plus its mask.

    Padding keeps a hidden state of its own, so a mean over it comes out wrong.
    """
    folder.mkdir(parents=True, exist_ok=True)
    graph = _Graph(np.random.default_rng(0))
    x = graph.op("Gather", [graph.weight(VOCAB, 8, scale=1.0), "input_ids"])
    mask = graph.op(
        "Unsqueeze", [graph.op("Cast", ["attention_mask"], to=TensorProto.FLOAT), graph.constant([2])]
    )
    graph.rename(graph.op("Add", [x, mask]), "last_hidden_state")
    tensor, integer = helper.make_tensor_value_info, TensorProto.INT64
    inputs = [tensor("input_ids", integer, ["B", "S"]), tensor("attention_mask", integer, ["B", "S"])]
    outputs = [tensor("last_hidden_state", TensorProto.FLOAT, ["B", "S", 8])]
    body = helper.make_graph(graph.nodes, "encoder", inputs, outputs, graph.initializers)
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(body, opset_imports=opsets, ir_version=10), str(folder / "model.onnx"))
    _write_json(folder / "config.json", {"max_position_embeddings": 16})
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def _grouped_attention(graph: _Graph, decoder: TinyDecoder) -> Any:
    one = graph.constant([1])
    total = graph.op("Shape", ["attention_mask"], start=1, end=2)
    total_scalar = graph.op("Cast", [graph.op("Squeeze", [total])], to=TensorProto.INT32)
    batch = graph.op("Shape", ["input_ids"], start=0, end=1)
    kind = decoder.lengths
    if kind == "total":
        last = graph.op("Expand", [graph.op("Sub", [total, one]), batch])
    else:
        last = graph.op("Sub", [graph.op("ReduceSum", ["attention_mask", one], keepdims=0), one])
    if kind == "row":
        first = graph.op("ArgMax", ["attention_mask"], axis=1, keepdims=0)
        last = graph.op("Add", [first, last])
    lengths = graph.op("Cast", [last], to=TensorProto.INT32)
    bias = "" if kind == "sum" else _mask_bias(graph, batch, total)
    angles = np.outer(np.arange(decoder.context), 100.0 ** -(np.arange(HEAD // 2) / (HEAD // 2)))
    cos, sin = graph.constant(np.cos(angles), np.float32), graph.constant(np.sin(angles), np.float32)

    def attend(layer: int, x: str) -> str:
        q, k, v = _projections(graph, x)
        past = [f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"]
        out, key, value = graph.op(
            "GroupQueryAttention",
            [q, k, v, *past, lengths, total_scalar, cos, sin, "", bias],
            outputs=3,
            domain="com.microsoft",
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
        )
        graph.rename(key, f"present.{layer}.key")
        graph.rename(value, f"present.{layer}.value")
        return str(out)

    return attend


def _short_convolution(graph: _Graph, layer: int, x: str) -> str:
    """Mix the last tokens channel by channel, between two matrices; rows are not padded."""
    channels_first = [0, 2, 1]
    inner = graph.op("MatMul", [x, graph.weight(HIDDEN, HIDDEN)])
    text = graph.op(
        "Concat",
        [f"past_conv.{layer}", graph.op("Transpose", [inner], perm=channels_first)],
        axis=2,
    )
    last, end, axis = (graph.constant([value]) for value in (-TAPS, 2**62, 2))
    graph.nodes.append(helper.make_node("Slice", [text, last, end, axis], [f"present_conv.{layer}"]))
    mixed = graph.op(
        "Conv", [text, graph.weight(HIDDEN, 1, TAPS, scale=1.0)], group=HIDDEN, kernel_shape=[TAPS]
    )
    new = graph.op("Slice", [mixed, graph.constant([1]), end, axis])
    out = graph.op(
        "MatMul", [graph.op("Transpose", [new], perm=channels_first), graph.weight(HIDDEN, HIDDEN)]
    )
    return str(graph.op("Tanh", [out]))


def _plain_attention(graph: _Graph) -> Any:
    total = graph.op("Shape", ["attention_mask"], start=1, end=2)
    batch = graph.op("Shape", ["input_ids"], start=0, end=1)
    length = graph.op("Shape", ["input_ids"], start=1, end=2)
    bias = graph.op("Add", [_mask_bias(graph, batch, total), _causal_bias(graph, length, total)])
    split = graph.constant([0, 0, -1, HEAD])

    def heads(x: str) -> str:
        return str(graph.op("Transpose", [graph.op("Reshape", [x, split])], perm=[0, 2, 1, 3]))

    def repeated(x: str) -> str:
        # Gather repeats each key/value head for the query heads of its group.
        groups = np.repeat(np.arange(KV_HEADS), HEADS // KV_HEADS)
        return str(graph.op("Gather", [x, graph.constant(groups)], axis=1))

    def attend(layer: int, x: str) -> str:
        q, k, v = (heads(part) for part in _projections(graph, x))
        k = graph.op("Concat", [f"past_key_values.{layer}.key", k], axis=2)
        v = graph.op("Concat", [f"past_key_values.{layer}.value", v], axis=2)
        scores = graph.op("MatMul", [q, graph.op("Transpose", [repeated(k)], perm=[0, 1, 3, 2])])
        scaled = graph.op("Mul", [scores, graph.constant(HEAD**-0.5, np.float32)])
        weights = graph.op("Softmax", [graph.op("Add", [scaled, bias])], axis=-1)
        mixed = graph.op("Transpose", [graph.op("MatMul", [weights, repeated(v)])], perm=[0, 2, 1, 3])
        graph.nodes += [
            helper.make_node("Identity", [k], [f"present.{layer}.key"]),
            helper.make_node("Identity", [v], [f"present.{layer}.value"]),
        ]
        return str(graph.op("Reshape", [mixed, graph.constant([0, 0, HIDDEN])]))

    return attend


def _projections(graph: _Graph, x: str) -> tuple[str, str, str]:
    widths = (HIDDEN, KV_HEADS * HEAD, KV_HEADS * HEAD)
    q, k, v = (graph.op("MatMul", [x, graph.weight(HIDDEN, width)]) for width in widths)
    return q, k, v


def _mask_bias(graph: _Graph, batch: str, total: str) -> str:
    """Return 0 where the mask is 1 and a large negative number elsewhere, [B, 1, S, T]."""
    mask = graph.op("Cast", ["attention_mask"], to=TensorProto.FLOAT)
    inverse = graph.op("Sub", [graph.constant(1.0, np.float32), mask])
    bias = graph.op("Mul", [inverse, graph.constant(-1e9, np.float32)])
    length = graph.op("Shape", ["input_ids"], start=1, end=2)
    shape = graph.op("Concat", [batch, graph.constant([1]), length, total], axis=0)
    return str(graph.op("Expand", [graph.op("Unsqueeze", [bias, graph.constant([1, 2])]), shape]))


def _causal_bias(graph: _Graph, length: str, total: str) -> str:
    """Return a large negative number where a key comes after its query, [S, T]."""
    zero, one = graph.constant(0), graph.constant(1)
    keys = graph.op("Range", [zero, graph.op("Squeeze", [total]), one])
    past = graph.op("Sub", [total, length])
    queries = graph.op("Add", [graph.op("Range", [zero, graph.op("Squeeze", [length]), one]), past])
    later = graph.op("Less", [graph.op("Unsqueeze", [queries, graph.constant([1])]), keys])
    hidden = graph.op("Cast", [later], to=TensorProto.FLOAT)
    return str(graph.op("Mul", [hidden, graph.constant(-1e9, np.float32)]))


def _byte_letters() -> list[str]:
    """Return the letter that byte-level tokenizers write for each byte, by byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value))

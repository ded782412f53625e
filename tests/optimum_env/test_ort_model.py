"""Bundles in Optimum's ORTModelForCausalLM: the tokens of our runtime, single and in padded batches.

Runs in an environment of its own (``make test-optimum``), since optimum-onnx pins older transformers. The environment
variable RK_BUNDLES names a folder that `tests/optimum_bundles.py` wrote in the main environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library is imported
pytest.importorskip("optimum.onnxruntime", reason="needs optimum-onnx: run `make test-optimum`")

import onnx
import onnxruntime as ort
import torch
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer, GenerationConfig

SAMPLE = Path(__file__).parents[2] / "samples" / "deploy_optimum.py"
PAD, END = 0, 2

# The heads of the last two are 32 wide, and hidden size / heads is 16.
FAMILIES = ("llama", "qwen3", "mistral")
WIDE_HEADS = FAMILIES[1:]


@dataclass(frozen=True)
class Case:
    """A bundle and what our runtime makes of its prompts, each alone."""

    folder: Path
    texts: list[str]
    ids: list[list[int]]
    tokens: list[list[int]]
    tokens_at_level_0: list[list[int]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> Case:
    return _case(request.param)


def _case(family: str) -> Case:
    made = os.environ.get("RK_BUNDLES")
    assert made, "set RK_BUNDLES to the folder that tests/optimum_bundles.py wrote"
    expected = json.loads((Path(made) / f"{family}-expected.json").read_text(encoding="utf-8"))
    return Case(Path(made) / family, **expected)


def _options() -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return options


def _loaded(folder: Path) -> Any:
    return ORTModelForCausalLM.from_pretrained(folder, session_options=_options(), trust_remote_code=False)


def _model(folder: Path) -> Any:
    """Load a bundle as docs/how-to/deploy.md says."""
    model = _loaded(folder)
    if getattr(model.config, "head_dim", None):
        model.embed_size_per_head = model.config.head_dim
    return model


def _tokenizer(case: Case) -> Any:
    return AutoTokenizer.from_pretrained(case.folder, padding_side="left", trust_remote_code=False)


def _encode(case: Case, texts: list[str]) -> Any:
    return _tokenizer(case)(texts, padding=True, return_tensors="pt", return_token_type_ids=False)


def _greedy(model: Any, inputs: Any, new_tokens: int) -> list[list[int]]:
    """Return greedy tokens a row up to its end-of-text token, with none of the bundle's sampling defaults."""
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=PAD, eos_token_id=END)
    rows = model.generate(**inputs, generation_config=config, use_model_defaults=False)[
        :, inputs["input_ids"].shape[1] :
    ]
    return [row[: row.index(END) + 1] if END in row else row for row in rows.tolist()]


def _longest(rows: list[list[int]]) -> int:
    assert len({tuple(row) for row in rows}) == len(rows), "one text for every prompt would prove nothing"
    return max(map(len, rows))


def test_the_tokenizer_makes_our_tokens_and_what_the_graph_takes(case: Case) -> None:
    tokenizer = _tokenizer(case)
    assert [tokenizer(text)["input_ids"] for text in case.texts] == case.ids
    assert set(tokenizer(case.texts[0])) == {"input_ids", "attention_mask"}


def test_logits_equal_those_of_onnxruntime(case: Case) -> None:
    session = ort.InferenceSession(case.folder / "model.onnx", _options(), providers=["CPUExecutionProvider"])
    feed: dict[str, Any] = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past_key_values")
    }
    inputs = _encode(case, case.texts[:1])
    (expected,) = session.run(["logits"], feed | {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        logits = _model(case.folder)(**inputs).logits.numpy()
    np.testing.assert_array_equal(logits, expected)


def test_single_rows_get_our_tokens(case: Case) -> None:
    model, longest = _model(case.folder), _longest(case.tokens)
    found = [_greedy(model, _encode(case, [text]), longest)[0] for text in case.texts]
    assert found == case.tokens


def test_the_sample_prints_our_text(case: Case) -> None:
    command = [sys.executable, str(SAMPLE), str(case.folder), "-p", case.texts[1], "--max-new-tokens"]
    command.append(str(len(case.tokens[1])))
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    expected = _tokenizer(case).decode(case.ids[1] + case.tokens[1], skip_special_tokens=True)
    assert done.stdout.removesuffix("\n") == expected


def test_left_padded_rows_get_our_tokens(case: Case, tmp_path: Path) -> None:
    """With float activations: as shipped (level 4) other rotary positions round to other int8 numbers."""
    inputs = _encode(case, case.texts)
    assert (inputs["attention_mask"][:, 0] == 0).sum() == len(case.texts) - 1
    found = _greedy(_model(_at_level_0(case.folder, tmp_path)), inputs, _longest(case.tokens_at_level_0))
    assert found == case.tokens_at_level_0


@pytest.mark.parametrize("family", WIDE_HEADS)
def test_wide_heads_need_the_line(family: str) -> None:
    """huggingface/optimum #2379; where this fails, Optimum was mended and deploy.md may lose the line."""
    case = _case(family)
    model = _loaded(case.folder)
    assert model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size
    with pytest.raises(Exception, match=r"(?s)past_key_values.*Got: 16 Expected: 32"):
        _greedy(model, _encode(case, case.texts[:1]), 2)


def _at_level_0(bundle: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(bundle, tmp_path / "exact"))
    graph = onnx.load(folder / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(graph, folder / "model.onnx")
    return folder

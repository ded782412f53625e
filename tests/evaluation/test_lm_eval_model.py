"""Bundles inside lm-eval: a task of its own format gives the scores of ours, and text rolls and is generated."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from rk_export.evaluation.lm_eval_model import BundleLM
from rk_export.evaluation.log_likelihood import PairEncoder
from rk_export.evaluation.multiple_choice import score_task
from rk_export.evaluation.tasks import Task, make_item
from rk_export.runtime import GenerationOptions

pytestmark = pytest.mark.whole

ITEMS = [
    {"context": "The train leaves at", "choices": ["9:15", "the gulls", "salt"], "gold": 0},
    {"context": "Add the", "choices": ["salt", "harbour"], "gold": 1},
    {"context": "The committee met on", "choices": ["Tuesday", "masts", "a"], "gold": 2},
    {"context": "Wait until it has", "choices": ["doubled", "arrives"], "gold": 0},
]


@pytest.fixture(scope="module")
def model(bundle: Path) -> BundleLM:
    return BundleLM(str(bundle), provider="cpu", threads=1)


def requests(kind: Any, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, arguments=one, idx=index) for index, one in enumerate(arguments)]


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A multiple-choice task as lm-eval describes it, its data in a local file."""
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, ITEMS)), encoding="utf-8")
    lines = [
        "task: own",
        "dataset_path: json",
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}",
        "test_split: test",
        "output_type: multiple_choice",
        'doc_to_text: "{{context}}"',
        'doc_to_choice: "{{choices}}"',
        "doc_to_target: gold",
        "metric_list: [{metric: acc}, {metric: acc_norm}]",
    ]
    (tmp_path / "own.yaml").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def test_lm_eval_reaches_our_scores(
    model: BundleLM, bundle: Path, task_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(task_folder / "cache"))
    results = simple_evaluate(
        model="rk-onnx",
        model_args={"bundle": str(bundle), "threads": 1},
        device="cpu",
        tasks=["own"],
        task_manager=TaskManager(include_path=str(task_folder), include_defaults=False),
        bootstrap_iters=0,
    )
    items = tuple(make_item(item["context"], item["choices"], item["gold"]) for item in ITEMS)
    ours = score_task(
        model.session.prefill_logits,
        Task("own", items),
        PairEncoder(model.session.text_codec),
        max_length=model.session.max_length,
    )
    theirs = results["results"]["own"]
    assert (theirs["acc,none"], theirs["acc_norm,none"]) == pytest.approx((ours.acc, ours.acc_norm))


@pytest.mark.parametrize("named", [[], ["--device", "cuda:0"]])
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without CUDA")
def test_the_command_line_runs_without_cuda_unless_it_names_it(
    bundle: Path, task_folder: Path, named: list[str]
) -> None:
    """The documented command: lm-eval passes ``cuda:0`` on, whether or not the user names it."""
    command = [sys.executable, "-m", "rk_export.evaluation.lm_eval_model", "--model", "rk-onnx"]
    command += ["--model_args", f"bundle={bundle},threads=1", "--tasks", "own", "--limit", "2"]
    command += ["--include_path", str(task_folder), *named]
    environment = os.environ | {"HF_DATASETS_CACHE": str(task_folder / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if named:
        assert done.returncode != 0
        assert "the CUDA execution provider cannot be used" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    assert done.stderr.count("running on the CPU execution provider") == 1


def test_the_name_is_registered() -> None:
    assert get_model("rk-onnx") is BundleLM


def test_a_rolling_text_counts_each_token_once_after_the_start_token(bundle: Path) -> None:
    model = BundleLM(str(bundle), device="cpu", threads=1, max_length=16)
    text = "The harbour was quiet in the early morning, and only the gulls moved between the masts."
    ids = model.session.text_codec.encode(text, special_tokens=False)
    assert 16 < len(ids) < 128
    tokens, total = [model._start, *ids], 0.0
    starts = [0, *range(16, len(ids) - 16, 16), len(ids) - 16]  # the last window is full too
    done = 0
    for start in starts:
        window = np.array([tokens[start : start + 17]])
        log_probs = torch.from_numpy(model.session.prefill_logits(window[:, :-1]))[0].double().log_softmax(-1)
        losses = log_probs.gather(1, torch.from_numpy(window[0, 1:, None]))[:, 0]
        total += float(losses[done - start :].sum())
        done = start + 16
    (found,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(total, abs=1e-3)


def test_an_empty_context_starts_at_the_start_token(model: BundleLM) -> None:
    ((value, greedy),) = model.loglikelihood(requests("loglikelihood", ("", "The")))
    ids = model.session.text_codec.encode("The", special_tokens=False)
    (rolled,) = model.loglikelihood_rolling(requests("loglikelihood_rolling", ("The",)))
    assert model._start == 1
    assert len(ids) >= 1
    assert value == pytest.approx(rolled, abs=1e-4)
    assert math.isfinite(value)
    assert isinstance(greedy, bool)


def test_generation_ends_at_stop_strings_and_keeps_the_order(model: BundleLM) -> None:
    greedy, sampled = {"until": ["\n"], "max_gen_toks": 6}, {"max_gen_toks": 4, "do_sample": True}
    texts = model.generate_until(
        requests(
            "generate_until",
            ("The train", greedy),
            ("Add", sampled),
            ("The", greedy),
            ("word " * 200, greedy),
        )
    )
    options = GenerationOptions(max_new_tokens=6, stop=("\n",))
    expected = [model.session.generate(prompt, options=options)[0].text for prompt in ("The train", "The")]
    assert [texts[0], texts[2]] == expected
    assert len(texts) == 4


def test_conversations_go_through_the_bundles_chat_template(model: BundleLM) -> None:
    assert model.apply_chat_template([{"role": "user", "content": "Hello"}]) == "[user] Hello "

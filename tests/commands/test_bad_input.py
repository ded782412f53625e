"""Whatever is wrong with the input: one message that says what, where and how to fix it, and nothing written."""

from __future__ import annotations

import errno
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Cli
from runtime_models import write_encoder
from safetensors.torch import load_file, save_file
from tiny_models import tiny_config, tiny_model

from rk_export import folders
from rk_export.bundle import write as write_bundle
from rk_export.errors import FusionError, InputError

Refused = Callable[..., str]
SMALL = ("--recipe", "joint-rank", "--device", "cpu", "--threads", 1)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return every file below a folder with its bytes, and every folder, unfinished runs left out."""
    unfinished = [path for path in folder.rglob(".*.work") if path.is_dir()]
    paths = (
        path
        for path in folder.rglob("*")
        if not path.is_symlink() and not {path, *path.parents} & {*unfinished}
    )
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Refused:
    """Run a command that must be refused cleanly and leave everything as it was; return its message."""

    def run(*arguments: object) -> str:
        before = contents(tmp_path)
        ended = cli(*arguments)
        assert ended.code == 2, ended.err
        assert ended.err.count("rk-export: error: ") == 1
        assert "Traceback" not in ended.err
        message = ended.err[ended.err.index("rk-export: error: ") :]
        assert "\nFix: " in message, "the message does not say what to do"
        assert contents(tmp_path) == before, "something was written"
        return message.removeprefix("rk-export: error: ")

    return run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a bundle should go."""
    return tmp_path / "out"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def edit_json(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | changes), encoding="utf-8")


# --- the model


def test_missing_model(refused: Refused, tmp_path: Path, out: Path) -> None:
    message = refused("compress", tmp_path / "nowhere", "-o", out)
    assert message.startswith(f"{tmp_path / 'nowhere'}: no such file or folder")


@pytest.mark.parametrize("name", ["model.txt", "model.gguf"])
def test_file_that_is_no_gguf(refused: Refused, tmp_path: Path, out: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not a model " * 100)
    assert refused("compress", tmp_path / name, "-o", out).startswith(str(tmp_path / name))


def test_folder_without_config(refused: Refused, model: Path, out: Path) -> None:
    (model / "config.json").unlink()
    assert refused("compress", model, "-o", out).startswith(f"{model}: no config.json")


def test_broken_config(refused: Refused, model: Path, out: Path) -> None:
    (model / "config.json").write_text("{", encoding="utf-8")
    assert str(model / "config.json") in refused("compress", model, "-o", out)


def test_missing_weights(refused: Refused, model: Path, out: Path) -> None:
    (model / "model.safetensors").unlink()
    assert refused("compress", model, "-o", out).startswith(f"{model}: no model.safetensors")


@pytest.mark.parametrize("kept", [0, 5, 1000, -100])
def test_truncated_weights(refused: Refused, model: Path, out: Path, kept: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert refused("compress", model, "-o", out).startswith(f"{path}: is truncated")


def test_missing_shard(refused: Refused, model: Path, out: Path) -> None:
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    message = refused("compress", model, "-o", out)
    assert message.startswith(f"{model / 'model-00001-of-00002.safetensors'}: is missing")


def change_tensor(model: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(model / "model.safetensors")
    changed = change(tensors.pop(name))
    kept = tensors if changed is None else {**tensors, name: changed}
    save_file(kept, model / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_not_finite(
    refused: Refused, model: Path, out: Path, name: str, value: float
) -> None:
    change_tensor(model, name, lambda tensor: tensor.index_fill(0, torch.tensor([3]), value))
    message = refused("compress", model, "-o", out, *SMALL)
    assert f"tensor {name!r} has 64 values that are NaN or infinite" in message


def test_missing_tensor(refused: Refused, model: Path, out: Path) -> None:
    change_tensor(model, "model.layers.0.self_attn.k_proj.weight", lambda tensor: None)
    message = refused("compress", model, "-o", out, *SMALL)
    assert "'model.layers.0.self_attn.k_proj.weight' is missing" in message


def test_weights_of_another_shape(refused: Refused, model: Path, out: Path) -> None:
    change_tensor(model, "model.layers.0.mlp.down_proj.weight", lambda tensor: tensor[:, :96].contiguous())
    message = refused("compress", model, "-o", out, *SMALL)
    assert message.startswith("model.layers.0.mlp.down_proj.weight: it has shape [64, 96]")


def test_pickle_weights_are_never_read(refused: Refused, model: Path, out: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "only pickle weights (pytorch_model.bin)" in refused("compress", model, "-o", out)


@pytest.mark.parametrize("model_type", ["no_such_model", "mamba"])
def test_unknown_architecture(refused: Refused, model: Path, out: Path, model_type: str) -> None:
    edit_json(model / "config.json", model_type=model_type)
    assert model_type in refused("compress", model, "-o", out)


# --- the options


AMOUNTS: list[tuple[tuple[object, ...], str]] = [
    (("--keep", 0), "--keep: 0.0 is not a share"),
    (("--keep", 1), "--keep: 1.0 is not a share"),
    (("--keep", 1.5), "--keep: 1.5 is not a share"),
    (("--keep", -0.5), "--keep: -0.5 is not a share"),
    (("--keep", "nan"), "--keep: nan is not a share"),
    (("--mean-bits", 1), "--mean-bits: 1.0 bits"),
    (("--device", "tpu"), "--device: unknown device 'tpu'"),
]
# A recipe, the settings that are made in it, and what is said of the last one.
SETTINGS: list[tuple[str, tuple[str, ...], str]] = [
    ("floats", ("factorize.keep=1.5",), "factorize.keep: 1.5 is not a share"),
    ("floats", ("factorize.energy=2.0",), "factorize.energy: 2.0 is not a share"),
    ("floats", ("factorize.rank=0",), "factorize.rank: 0 is not a rank"),
    ("floats", ("factorize.rank_multiple=0",), "factorize.rank_multiple: 0 is below 1"),
    ("int4", ("quantize.block=48",), "quantize.block: a block of 48 columns"),
    ("int4", ("quantize.bits=1",), "quantize.bits: 1 bits cannot be packed"),
    ("int4", ("quantize[1].bits=5",), "quantize.bits: 5 bits cannot be packed"),
    ("joint-rank", ("factorize.groups=[qk, magic]",), "factorize.groups: unknown group 'magic'"),
    ("joint-rank", ("factorize.groups=[qk, gate_up, qk]",), "factorize.groups: 'q' stands in both"),
    ("joint-rank", ("factorize.groups=[qkv, k]",), "factorize.groups: 'k' stands in both 'qkv' and 'k'"),
    ("joint-rank", ("factorize.qk=half",), "factorize.qk: "),
    (
        "joint-rank",
        ("factorize.groups=[gate_up]", "factorize.qk=per-head"),
        "factorize.qk: per-head needs the group qk",
    ),
    ("joint-rank", ("factorize.gauge=tight",), "factorize.gauge: "),
    ("int4", ("target.ep=tpu",), "target.ep: "),
    ("int4", ("target.accuracy_level=3",), "target.accuracy_level: unknown level 3"),
    ("joint-rank", ("factorize.allocation=magic",), "factorize.allocation: "),
    ("floats", ("factorize.allocation=energy",), "factorize.allocation: energy spreads the share"),
    ("cap", ("cap.selector=dice",), "cap.selector: "),
    ("cap", ("cap.keep=null",), "cap: nothing says how much stays"),
    ("cap", ("factorize.groups=[qk]",), "cap decides already what stays of every matrix"),
    ("int4", ("prune.blocks=-1",), "prune.blocks: -1 is too few"),
    ("int4", ("prune.ffn_keep=0",), "prune.ffn_keep: 0.0 is not a share"),
    ("int4", ("prune.kv_heads_keep=0",), "prune.kv_heads_keep: 0 is too few"),
    ("floats", ("correct.rank=4",), "correct: only weight-only quantization"),
    ("default", ("correct.rank=4",), "correct: a budget does not price"),
]
# Likewise, where only the model shows that it cannot be.
OF_THE_MODEL: list[tuple[str, tuple[str, ...], str]] = [
    ("floats", ("factorize.rank=1000",), "factorize.rank: rank 1000 exceeds 64"),
    (
        "floats",
        ("factorize.keep=0.001", "factorize.allocation=energy"),
        "factorize.keep: 0.001 of the parameters do not",
    ),
    ("cap", ("calibration.text=none",), "calibration.text: a budget needs statistics"),
    ("int4", ("prune.blocks=2",), "prune.blocks: 2 of 2 blocks"),
    ("int4", ("prune.ffn_keep=0.1",), "prune.ffn_keep: 0.1 of 128 neurons"),
    ("int4", ("prune.kv_heads_keep=2",), "prune.kv_heads_keep: 2 key/value heads are not fewer"),
]


def settings(recipe: str, texts: tuple[str, ...]) -> list[str]:
    return ["--recipe", recipe, *(word for text in texts for word in ("--set", text))]


def shown(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else ""


@pytest.mark.parametrize(("arguments", "where"), AMOUNTS, ids=shown)
def test_impossible_option(
    refused: Refused, llama: Path, out: Path, arguments: tuple[object, ...], where: str
) -> None:
    assert refused("compress", llama, "-o", out, *arguments).startswith(where)


@pytest.mark.parametrize(("recipe", "texts", "where"), SETTINGS, ids=shown)
def test_impossible_setting(
    refused: Refused, llama: Path, out: Path, recipe: str, texts: tuple[str, ...], where: str
) -> None:
    message = refused("compress", llama, "-o", out, *settings(recipe, texts))
    assert message.startswith(f"--set {texts[-1]}: ")
    assert where in message


@pytest.mark.parametrize(("recipe", "texts", "where"), OF_THE_MODEL, ids=shown)
def test_setting_that_does_not_fit_the_model(
    refused: Refused, llama: Path, out: Path, recipe: str, texts: tuple[str, ...], where: str
) -> None:
    assert refused("compress", llama, "-o", out, *settings(recipe, texts)).startswith(where)


def test_task_without_its_text(refused: Refused, llama: Path, out: Path) -> None:
    message = refused("compress", llama, "-o", out, "--recipe", "basel", "--keep", 0.5)
    assert "basel.target: the field is missing" in message


def test_dry_run_refuses_the_same(refused: Refused, llama: Path, out: Path) -> None:
    words = settings("floats", ("factorize.rank=1000",))
    assert refused("compress", llama, "-o", out, "--dry-run", *words).startswith("factorize.rank: ")


def test_group_that_matches_nothing(refused: Refused, tmp_path: Path, out: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "gpt2")
    message = refused("compress", tmp_path / "gpt2", "-o", out, "--recipe", "joint-rank")
    assert message.startswith("factorize.groups: the group 'gate_up' matches nothing in a gpt2 model")
    assert "qk" in message.partition("Fix: ")[2]
    assert "gate_up" not in message.partition("Fix: ")[2]


@pytest.mark.whole
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent(refused: Refused, llama: Path, bundle: Path, out: Path) -> None:
    assert refused("compress", llama, "-o", out, "--device", "cuda").startswith("--device: ")
    message = refused("run", bundle, "-p", "hello", "--provider", "cuda")
    assert message.startswith("provider: the CUDA execution provider cannot be used")


# --- the plan


@pytest.fixture
def plan(cli: Cli, llama: Path, tmp_path: Path) -> Path:
    """A plan for the tiny model."""
    path = tmp_path / "plan.json"
    assert cli("plan", llama, "-o", path, "--recipe", "joint-rank").code == 0
    return path


def edit_site(plan: Path, **changes: Any) -> None:
    data = json.loads(plan.read_text(encoding="utf-8"))
    site = next(site for site in data["sites"] if site["site"] == "layers.1.qk")
    site |= changes
    plan.write_text(json.dumps(data), encoding="utf-8")


def test_plan_of_another_model(refused: Refused, plan: Path, tmp_path: Path, out: Path) -> None:
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "other")
    message = refused("compress", tmp_path / "other", "-o", out, "--plan", plan)
    assert "the plan was made for another model" in message


def test_plan_and_options_together(refused: Refused, llama: Path, plan: Path, out: Path) -> None:
    message = refused("compress", llama, "-o", out, "--plan", plan, "--keep", 0.5)
    assert message.startswith("--plan: a plan already holds its recipe")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"rank": 65}, "layers.1.qk: rank 65 exceeds the full rank 64"),
        ({"rank": 0}, "layers.1.qk: rank 0 does not fit"),
        ({"rank": -3}, "layers.1.qk: rank -3 does not fit"),
        ({"form": "round"}, ".form: expected 'dense'"),
        ({"paths": ["self_attn.q_proj", "self_attn.z_proj"]}, "layers.1.qk: no such matrix"),
        ({"colour": "red"}, "colour"),
    ],
    ids=lambda value: str(value),
)
def test_edited_plan(
    refused: Refused, llama: Path, plan: Path, out: Path, changes: dict[str, Any], what: str
) -> None:
    edit_site(plan, **changes)
    assert what in refused("compress", llama, "-o", out, "--plan", plan)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"rk_export_plan": 99}'])
def test_file_that_is_no_plan(refused: Refused, llama: Path, tmp_path: Path, out: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    assert refused("compress", llama, "-o", out, "--plan", path).startswith(str(path))


def test_missing_plan(refused: Refused, llama: Path, tmp_path: Path, out: Path) -> None:
    path = tmp_path / "plan.json"
    assert refused("compress", llama, "-o", out, "--plan", path).startswith(str(path))


# --- the output


@pytest.mark.whole
def test_existing_output_is_kept(refused: Refused, llama: Path, own_bundle: Path) -> None:
    assert "--force" in refused("compress", llama, "-o", own_bundle, *SMALL)
    assert "--force" in refused("analyze", llama, "-o", own_bundle)
    assert "--force" in refused("plan", llama, "-o", own_bundle / "plan.json")


@pytest.mark.whole
def test_force_replaces_it(cli: Cli, llama: Path, own_bundle: Path) -> None:
    old = (own_bundle / "model.onnx.data").read_bytes()
    (own_bundle / "left-over").write_text("x", encoding="utf-8")
    assert cli("compress", llama, "-o", own_bundle, *SMALL, "--force").code == 0
    assert (own_bundle / "model.onnx.data").read_bytes() != old
    assert not (own_bundle / "left-over").exists()
    assert cli("verify", own_bundle).code == 0
    assert [path.name for path in own_bundle.parent.iterdir()] == [own_bundle.name]


def test_force_spares_what_is_not_ours(refused: Refused, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"beach")
    message = refused("compress", llama, "-o", tmp_path / "photos", *SMALL, "--force")
    assert "was not written by rk-export" in message


def test_output_inside_a_file(refused: Refused, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    assert str(tmp_path / "file") in refused("compress", llama, "-o", tmp_path / "file" / "out", *SMALL)


def fail_with(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.whole
def test_failure_in_the_middle(
    refused: Refused, llama: Path, own_bundle: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_bundle, "build_graph", fail_with(FusionError("missing", fix="report it")))
    for output in (out, own_bundle):
        assert refused("compress", llama, "-o", output, *SMALL, "--force") == "missing\nFix: report it\n"


@pytest.mark.whole
def test_interruption_in_the_middle(
    cli: Cli, llama: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_bundle, "html", fail_with(KeyboardInterrupt()))
    before = contents(own_bundle.parent)
    assert cli("compress", llama, "-o", own_bundle, *SMALL, "--force").code == 130
    assert contents(own_bundle.parent) == before


@pytest.mark.whole
@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "full"), OSError(errno.EDQUOT, "quota"), OSError("64 requested and 0 written")],
    ids=["full", "quota", "short write"],
)
def test_full_disk(
    refused: Refused, llama: Path, own_bundle: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    monkeypatch.setattr(write_bundle, "save_graph", fail_with(error))
    message = refused("compress", llama, "-o", own_bundle, *SMALL, "--force")
    assert message.startswith(f"{own_bundle}: no space left on the disk")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_full_disk_as_numpy_meets_it(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="no space left on the disk"),
        folders.AtomicFolder(tmp_path / "out"),
        open("/dev/full", "wb") as file,
    ):
        np.zeros(10**6, np.uint8).tofile(file)
    assert list(tmp_path.iterdir()) == []


def test_disk_known_to_be_too_small(
    refused: Refused, llama: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: usage(10_000, 9_000, 1_000))
    message = refused("compress", llama, "-o", out, *SMALL)
    assert message.startswith(f"{out}: no space left on the disk")
    assert "1.00 kB are free" in message


# --- the bundle


@pytest.mark.whole
@pytest.mark.parametrize("name", ["model.onnx.data", "model.onnx", "tokenizer.json", "plan.json"])
def test_one_flipped_byte(refused: Refused, own_bundle: Path, name: str) -> None:
    data = bytearray((own_bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (own_bundle / name).write_bytes(data)
    message = refused("verify", own_bundle)
    assert message.startswith(f"{own_bundle / name}: corrupted: its checksum differs")


@pytest.mark.whole
def test_truncated_file(refused: Refused, own_bundle: Path) -> None:
    path = own_bundle / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused("verify", own_bundle).startswith(f"{path}: corrupted: ")


@pytest.mark.whole
@pytest.mark.parametrize("name", ["model.onnx.data", "genai_config.json"])
def test_missing_file(refused: Refused, own_bundle: Path, name: str) -> None:
    (own_bundle / name).unlink()
    assert refused("verify", own_bundle).startswith(f"{own_bundle / name}: listed in the manifest")


@pytest.mark.whole
def test_running_half_a_bundle(refused: Refused, own_bundle: Path) -> None:
    (own_bundle / "model.onnx.data").unlink()
    assert refused("run", own_bundle, "-p", "hello").startswith(str(own_bundle / "model.onnx"))


@pytest.mark.parametrize(
    "command", [("verify",), ("run", "-p", "x"), ("bench",), ("explain",)], ids=lambda command: command[0]
)
def test_folder_that_is_no_bundle(refused: Refused, tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "empty").mkdir()
    name, *options = command
    assert refused(name, tmp_path / "empty", *options).startswith(str(tmp_path / "empty"))


@pytest.mark.whole
def test_verification_against_another_model(refused: Refused, bundle: Path, tmp_path: Path) -> None:
    tiny_model("llama", vocab_size=300).save_pretrained(tmp_path / "other")
    message = refused("verify", bundle, "--against", tmp_path / "other")
    assert "the plan was made for another model" in message


# --- text and prompts


@pytest.mark.whole
def test_text_that_is_none(refused: Refused, bundle: Path, tmp_path: Path) -> None:
    empty, binary, lone = tmp_path / "empty", tmp_path / "binary", tmp_path / "lone"
    empty.write_text(" \n", encoding="utf-8")
    binary.write_bytes(bytes(range(256)))
    lone.write_text("a", encoding="utf-8")
    evaluate = ("eval", bundle, "--context", 64, "--text")
    assert refused(*evaluate, empty).startswith(f"{empty}: the text is empty")
    assert refused(*evaluate, binary).startswith(f"{binary}: not a UTF-8 text file")
    assert refused(*evaluate, tmp_path / "none").startswith(f"{tmp_path / 'none'}: no such file")
    assert "at least 2" in refused(*evaluate, lone)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--context", 1), "context: "),
        (("--context", 129), "--context: a window of 129 tokens is longer than the model's context of 128"),
        (("--context", 64, "--tokens", 1), "limit: "),
        (("--provider", "tpu"), "provider: 'tpu' is unknown"),
        (("--threads", 0), "threads: 0 is out of range"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_impossible_evaluation(
    refused: Refused, bundle: Path, prose: Path, arguments: tuple[object, ...], what: str
) -> None:
    assert refused("eval", bundle, "--text", prose, *arguments).startswith(what)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (
            ("--set", "calibration.text=absent.txt"),
            "--set calibration.text=absent.txt: calibration.text: neither",
        ),
        (("--threads", 0), "threads: 0 is out of range"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_refusal_comes_before_the_work(
    refused: Refused,
    llama: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    what: str,
) -> None:
    monkeypatch.setattr(
        "rk_export.commands.stages.compression_inputs", fail_with(AssertionError("the refusal came too late"))
    )
    assert refused("compress", llama, "-o", out, *SMALL, *arguments).startswith(what)


def test_encoder_has_no_perplexity(refused: Refused, tmp_path: Path, prose: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    assert refused("eval", tmp_path / "bert", "--text", prose).startswith("--text: bert is an encoder")
    bundle = write_encoder(tmp_path / "bundle")
    assert refused("eval", bundle, "--text", prose).startswith("--text: bundle is an encoder")


@pytest.mark.whole
def test_prompt_longer_than_the_context(refused: Refused, bundle: Path) -> None:
    assert "leave no room in a context of 128" in refused("run", bundle, "-p", "word " * 200)


@pytest.mark.whole
def test_empty_prompt(refused: Refused, bundle: Path) -> None:
    assert refused("run", bundle, "-p", "").startswith("prompt: it has no tokens")


@pytest.mark.whole
def test_chat_without_a_template(refused: Refused, own_bundle: Path) -> None:
    (own_bundle / "chat_template.jinja").unlink()
    message = refused("run", own_bundle, "-p", "hello", "--chat")
    assert message.startswith(f"{own_bundle / 'chat_template.jinja'}: no chat template")


@pytest.mark.whole
@pytest.mark.parametrize(
    "arguments",
    [
        ("--max-new-tokens", 0),
        ("--temperature", -1),
        ("--temperature", "inf"),
        ("--top-p", 0),
        ("--top-k", -1),
        ("--min-p", 1.5),
        ("--repetition-penalty", "nan"),
        ("--stop", ""),
    ],
    ids=lambda arguments: arguments[0],
)
def test_impossible_sampling(refused: Refused, bundle: Path, arguments: tuple[object, ...]) -> None:
    assert "out of range" in refused("run", bundle, "-p", "hello", *arguments)


# --- checkpoints


def test_damaged_checkpoint(refused: Refused, tmp_path: Path, out: Path) -> None:
    config = tiny_config("llama").to_dict() | {"rk_export": {"version": 99}}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "version 1" in refused("export", tmp_path / "checkpoint", "-o", out)

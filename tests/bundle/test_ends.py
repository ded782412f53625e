"""Where texts end: every file that may name a token, what the bundle then says, and refusals before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from chat_tokenizers import CHATML, write_json, write_tokenizer
from conftest import Cli
from fetched import smollm2
from hypothesis import given, settings
from hypothesis import strategies as st
from runtime_models import EOS, TinyDecoder, byte_tokenizer
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from rk_export.bundle.check_ends import check_ends
from rk_export.errors import InputError
from rk_export.runtime import FinishReason, GenerationOptions, Session
from rk_export.runtime.ends import Ends, read_ends
from rk_export.runtime.generate import Row
from rk_export.source.side_files import write_side_files
from rk_export.source.stored import open_source

IM_END, VOCAB = 259, 320


def folder_of(folder: Path, template: str | None = None, tokenizer: bool = True, **files: Any) -> Path:
    """Write a folder in which nothing names an end but the files given, by their names without the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        write_tokenizer(folder, template, eos_token=None)
    for name, values in {"config": {"vocab_size": VOCAB}, **files}.items():
        path = folder / f"{name}.json"
        write_json(path, {**(json.loads(path.read_text()) if path.is_file() else {}), **values})
    return folder


@pytest.mark.parametrize(
    ("files", "ends"),
    [
        ({}, []),
        ({"generation_config": {"eos_token_id": 7}}, [7]),
        ({"generation_config": {"eos_token_id": [9, 7, 9]}}, [9, 7]),
        ({"config": {"vocab_size": VOCAB, "eos_token_id": 2}}, [2]),
        ({"config": {"vocab_size": VOCAB, "eos_token_id": [2, 3]}}, [2, 3]),
        ({"config": {"text_config": {"eos_token_id": 4, "vocab_size": VOCAB}}}, [4]),
        ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, [IM_END]),
        ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, [IM_END]),
        ({"tokenizer_config": {"eos_token": "a"}}, [97]),
        ({"special_tokens_map": {"eos_token": "<|im_end|>"}}, [IM_END]),
        ({"special_tokens_map": {"eos_token": {"content": "<|im_end|>"}}}, [IM_END]),
        (
            {"special_tokens_map": {"eos_token": "<eos>"}, "tokenizer_config": {"eos_token": "<|im_end|>"}},
            [EOS],
        ),
        ({"genai_config": {"model": {"eos_token_id": [5, 6]}}}, [5, 6]),
        # Several places at once: generation_config.json first, and no token twice.
        (
            {"config": {"vocab_size": VOCAB, "eos_token_id": 2}, "tokenizer_config": {"eos_token": "<eos>"}},
            [2, EOS],
        ),
        ({"generation_config": {"eos_token_id": EOS}, "tokenizer_config": {"eos_token": "<eos>"}}, [EOS]),
        (
            {"generation_config": {"eos_token_id": []}, "config": {"vocab_size": VOCAB, "eos_token_id": 2}},
            [2],
        ),
        # Beside a generation config, the config counts with tokens only that are no words.
        (
            {
                "generation_config": {"eos_token_id": 7},
                "config": {"vocab_size": VOCAB, "eos_token_id": [2, EOS]},
            },
            [7, EOS],
        ),
        # None of these can end a text.
        ({"generation_config": {"eos_token_id": None}}, []),
        ({"generation_config": {"eos_token_id": [-1]}}, []),
        ({"generation_config": {"eos_token_id": [VOCAB, 7]}}, [7]),
        ({"tokenizer_config": {"eos_token": "<absent>"}}, []),
    ],
    ids=str,
)
def test_every_place_is_read(tmp_path: Path, files: dict[str, Any], ends: list[int]) -> None:
    assert list(read_ends(folder_of(tmp_path, **files)).ids) == ends


def test_a_passed_over_map_still_ends_texts(tmp_path: Path) -> None:
    decoder = {str(IM_END): {"content": "<|im_end|>", "special": True}}
    files = {
        "tokenizer_config": {"added_tokens_decoder": decoder},
        "special_tokens_map": {"eos_token": "<|im_end|>"},
    }
    assert read_ends(folder_of(tmp_path, **files)).ids == (IM_END,)


def test_ids_that_the_config_alone_knows(tmp_path: Path) -> None:
    decoder = {str(IM_END): {"content": "<|im_end|>", "special": True}}
    folder = folder_of(
        tmp_path, tokenizer_config={"added_tokens_decoder": decoder, "eos_token": "<|im_end|>"}
    )
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    assert read_ends(folder).ids == (IM_END,)
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    write_json(folder / "added_tokens.json", {"<|im_end|>": IM_END})
    assert read_ends(folder).ids == (IM_END,)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (CHATML, "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }}<|im_end|><eos>{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{{ m.content }} that is all.<eos>{% endfor %}", "<eos>"),
        ("{% for m in messages %}<|im_start|>{{ m.content[0].text }}<|im_end|>{% endfor %}", "<|im_end|>"),
        ("{% for m in messages %}{% generation %}{{ m.content }}<eos>{% endgeneration %}{% endfor %}", "<eos>"),
        ("{% if messages[0].role == 'x' %}{{ raise_exception('') }}{% endif %}{{ messages[1].content }}<eos>", "<eos>"),
        ("{% for m in messages %}<|im_start|>{{ m.content }}\n{% endfor %}", None),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}<eos>{% endif %}{% endfor %}", None),
        ("{{ raise_exception('never') }}", None),
        ("{% if %}", None),
    ],
)  # fmt: skip
def test_the_end_of_turn_is_what_the_template_writes_behind_an_answer(
    tmp_path: Path, template: str, end: str | None
) -> None:
    ends = read_ends(folder_of(tmp_path, template))
    assert list(ends.texts.values()) == ([] if end is None else [end])
    if end is not None:
        assert ends.named_in[ends.ids[0]] == ("chat template (end of turn)",)


@pytest.mark.parametrize("value", ["2", 2.5, True, {"id": 2}, [[2]], ["</s>"]], ids=str)
@pytest.mark.parametrize("file", ["config", "generation_config"])
def test_what_is_no_token_id_is_refused(tmp_path: Path, file: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"{file}\.json: eos_token_id is") as refused:
        read_ends(folder_of(tmp_path, **{file: {"eos_token_id": value}}))
    assert refused.value.fix


def test_malformed_tokenizer_files_are_refused(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, tokenizer_config={"added_tokens_decoder": {"x": {"content": 1}}, "eos_token": "a"}
    )
    with pytest.raises(InputError, match="a list of its tokens is malformed"):
        read_ends(folder)
    (folder / "special_tokens_map.json").write_text("[]")
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"special_tokens_map\.json: not a JSON object"):
        read_ends(folder)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 400)
    | st.text(max_size=3)
    | st.sampled_from(["<eos>", "<|im_end|>"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["content", "id", "vocab", "0", "7", "eos_token", "a"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)
_FIELDS = {
    "config.json": ("eos_token_id", "text_config", "vocab_size"),
    "generation_config.json": ("eos_token_id",),
    "genai_config.json": ("model",),
    "tokenizer_config.json": ("eos_token", "added_tokens_decoder", "chat_template", "extra_special_tokens"),
    "special_tokens_map.json": ("eos_token", "bos_token"),
    "added_tokens.json": ("a", "<eos>"),
    "tokenizer.json": ("added_tokens", "model"),
}


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({}, optional={
    file: st.fixed_dictionaries({}, optional=dict.fromkeys(fields, _JSON)) for file, fields in _FIELDS.items()
}))  # fmt: skip
def test_any_files_give_ends_or_a_message(files: dict[str, Any]) -> None:
    with TemporaryDirectory() as folder:
        for name, values in files.items():
            write_json(Path(folder) / name, values)
        ends, where = Ends({}, {}), folder
        try:
            ends = read_ends(Path(folder))
        except InputError as error:
            where = str(error.where)
    assert where.startswith(folder)
    assert all(end >= 0 for end in ends.ids)
    assert set(ends.texts) <= set(ends.ids)
    assert len(ends.labels) == len(ends.ids)


# --- what the bundle says


def tokenizer_only(folder: Path) -> Path:
    """A model whose config names 2, an ordinary token, while its tokenizer ends with <|im_end|>."""
    tiny_model("llama", vocab_size=VOCAB, eos_token_id=2).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    return write_tokenizer(folder)


def with_generation(ends: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        tiny_model("llama", vocab_size=VOCAB, eos_token_id=2).save_pretrained(folder)
        write_json(folder / "generation_config.json", {"eos_token_id": ends})
        return write_tokenizer(folder, eos_token="<eos>")

    return write


@pytest.mark.parametrize(
    ("write", "ends"),
    [
        (tokenizer_only, [2, IM_END]),
        (with_generation([7, 8]), [7, 8, EOS, IM_END]),
        (with_generation(None), [2, EOS, IM_END]),
    ],
    ids=["tokenizer", "list", "null"],
)  # fmt: skip
def test_all_runtimes_are_told_the_same_ends(
    tmp_path: Path, write: Callable[[Path], Path], ends: list[int]
) -> None:
    source, out = open_source(write(tmp_path / "source")), tmp_path / "out"
    out.mkdir()
    transformers_ends = _transformers_ends(tmp_path / "source")
    assert list(check_ends(source.folder, source.config).ids) == ends
    write_side_files(out, source=source.folder, config=source.config)
    assert GenerationConfig.from_pretrained(out).eos_token_id == ends
    assert set(read_ends(out).ids) == set(ends) >= transformers_ends


def _transformers_ends(folder: Path) -> set[int]:
    """Return the tokens at which transformers' generate stops a model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ends = set()
    for token in (*range(10), *range(EOS - 1, IM_END + 4)):
        head = torch.nn.Linear(model.config.hidden_size, VOCAB)
        torch.nn.init.zeros_(head.weight)
        head.bias.data = torch.nn.functional.one_hot(torch.tensor(token), VOCAB).float()
        model.lm_head = head
        made = model.generate(torch.tensor([[1, 3]]), max_new_tokens=2, do_sample=False, pad_token_id=0)
        if made.shape[1] == 3:
            ends.add(token)
    return ends


@pytest.mark.whole
def test_a_bundle_ends_where_only_the_tokenizer_says_so(cli: Cli, tmp_path: Path) -> None:
    source, out = tokenizer_only(tmp_path / "source"), tmp_path / "out"
    ended = cli("export", source, "-o", out)
    assert ended.code == 0, ended.err
    assert json.loads((out / "genai_config.json").read_text())["model"]["eos_token_id"] == [2, IM_END]
    assert "A text ends at token 2 or `<|im_end|>` (259)." in (out / "README.md").read_text()
    assert Session.from_pretrained(out, provider="cpu").config.eos_ids == {2, IM_END}


@pytest.mark.whole
def test_a_checkpoint_keeps_the_ends_of_the_generation_config(cli: Cli, tmp_path: Path) -> None:
    source = with_generation([7, 8])(tmp_path / "source")
    arguments = ("--recipe", "floats", "--checkpoint", tmp_path / "checkpoint")
    assert cli("compress", source, "-o", tmp_path / "a", *arguments).code == 0
    assert cli("export", tmp_path / "checkpoint", "-o", tmp_path / "b").code == 0
    for out in ("a", "b"):
        assert read_ends(tmp_path / out).ids == (7, 8, EOS, IM_END)


@pytest.mark.whole
def test_every_runtime_ends_at_the_token_that_only_the_tokenizer_names(cli: Cli, tmp_path: Path) -> None:
    """The model is made to meet its end: the tokenizer names a token that greedy decoding is known to write."""
    genai = pytest.importorskip("onnxruntime_genai")
    source, prompt = with_generation(5)(tmp_path / "source"), [1, 70, 80, 90]
    model = AutoModelForCausalLM.from_pretrained(source)
    free = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    written = [token for token in free[0, len(prompt) :].tolist() if token < 256 and token != 5]
    end = written[3]
    text = next(text for text, index in byte_tokenizer().get_vocab().items() if index == end)
    write_tokenizer(source, None, eos_token=text)

    assert cli("export", source, "-o", tmp_path / "out").code == 0
    ours = Session.from_pretrained(tmp_path / "out", provider="cpu").generate([prompt])[0]
    assert (ours.finish_reason, ours.token_ids[-1]) == (FinishReason.EOS, end)
    ends = GenerationConfig.from_pretrained(tmp_path / "out")
    theirs = model.generate(
        torch.tensor([prompt]), generation_config=ends, max_new_tokens=40, do_sample=False
    )
    assert tuple(theirs[0, len(prompt) :].tolist()) == ours.token_ids
    onnx_model = genai.Model(str(tmp_path / "out"))
    parameters = genai.GeneratorParams(onnx_model)
    parameters.set_search_options(max_length=60, do_sample=False)
    generator = genai.Generator(onnx_model, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    made = generator.get_sequence(0)[len(prompt) :].tolist()
    assert made in (list(ours.token_ids), list(ours.token_ids[:-1]))


# --- refused before work


def endless(folder: Path) -> Path:
    tiny_model("llama", vocab_size=VOCAB, eos_token_id=None).save_pretrained(folder)
    return write_tokenizer(folder, None, eos_token=None)


def test_a_model_without_any_end_is_refused_before_work(cli: Cli, tmp_path: Path) -> None:
    source, out = endless(tmp_path / "source"), tmp_path / "out"
    for command in (("compress", "--dry-run"), ("compress",), ("export",)):
        ended = cli(command[0], source, "-o", out, *command[1:])
        assert (ended.code, out.exists()) == (2, False)
        assert f"{source}: no file names a token that ends a text" in ended.err
        assert "calibrate:" not in ended.err
    write_json(source / "generation_config.json", {"eos_token_id": [-1, 5000]})
    assert "eos_token_id 5000, outside a vocabulary of 320" in cli("export", source, "-o", out).err


def test_what_is_ignored_is_said(cli: Cli, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = open_source(with_generation([7, -1])(tmp_path / "source"))
    assert check_ends(source.folder, source.config).ids == (7, EOS, IM_END)
    assert "generation_config.json names eos_token_id -1" in caplog.text
    assert "config.json names eos_token_id 2, which neither" in caplog.text


@pytest.mark.parametrize(
    ("file", "text"),
    [("generation_config.json", "[1]"), ("generation_config.json", "{"), ("special_tokens_map.json", "[]"),
     ("generation_config.json", '{"eos_token_id": "</s>"}')],
)  # fmt: skip
def test_broken_files_are_refused_by_name(cli: Cli, tmp_path: Path, file: str, text: str) -> None:
    source = tokenizer_only(tmp_path / "source")
    (source / file).write_text(text)
    ended = cli("export", source, "-o", tmp_path / "out", "--json")
    assert (ended.code, (tmp_path / "out").exists()) == (2, False)
    assert str(source / file) in ended.err


# --- generation


def row(session: Session, tokens: list[int], options: GenerationOptions) -> Row:
    """Return a row that was made to choose the given tokens until it ended."""
    one = session.row([1], replace(options, max_new_tokens=len(tokens)))
    for token in tokens:
        if one.finish_reason is None:
            one.advance(np.eye(VOCAB, dtype=np.float32)[token])
    return one


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A bundle with ChatML's tokens that names <eos> as its only end."""
    bundle = TinyDecoder().write(tmp_path_factory.mktemp("stop") / "bundle")
    shutil.rmtree(bundle / "chat_template.jinja", ignore_errors=True)
    write_tokenizer(bundle, "{{ messages[0].content }}", eos_token="<eos>")
    write_json(bundle / "config.json", {"vocab_size": VOCAB, "max_position_embeddings": 96, "head_dim": 16})
    return Session.from_pretrained(bundle, provider="cpu", threads=1)


@pytest.mark.parametrize(
    ("stop", "written", "text", "reason"),
    [
        (("<|im_end|>",), [97, IM_END, 98], "a", FinishReason.STOP),
        (("<|im_end|>\n",), [97, IM_END, 10, 98], "a", FinishReason.STOP),
        (("<|im_end|>\n",), [97, IM_END, 98], "ab", FinishReason.LENGTH),
        (("b<|im_end|>",), [97, 98, IM_END, 99], "a", FinishReason.STOP),
        (("b<|im_end|>c",), [97, 98, IM_END, 100], "abd", FinishReason.LENGTH),
        (("bc",), [97, 98, IM_END, 99, 100], "a", FinishReason.STOP),
        (("x</think>",), [97, 120, 261, 98], "a", FinishReason.STOP),
        (("</think><|im_end|>",), [97, 261, IM_END, 98], "a", FinishReason.STOP),
        (("b<eos>",), [97, 98, EOS], "a", FinishReason.EOS),
        (("<eos>",), [97, 98, EOS], "ab", FinishReason.EOS),
        ((), [97, IM_END, 98], "ab", FinishReason.LENGTH),
    ],
    ids=str,
)
def test_stop_strings_see_special_tokens(
    session: Session, stop: tuple[str, ...], written: list[int], text: str, reason: FinishReason
) -> None:
    result = row(session, written, GenerationOptions(stop=stop)).result()
    assert (result.text, result.finish_reason) == (text, reason)


@pytest.mark.parametrize(
    ("ids", "text", "reason", "kept"),
    [
        ((IM_END,), "ab", FinishReason.STOP, 3),
        ((98,), "a", FinishReason.STOP, 2),
        ((5, 98, IM_END), "a", FinishReason.STOP, 2),
        ((EOS,), "abc", FinishReason.EOS, 5),
    ],
    ids=str,
)
def test_stop_tokens(
    session: Session, ids: tuple[int, ...], text: str, reason: FinishReason, kept: int
) -> None:
    result = row(session, [97, 98, IM_END, 99, EOS], GenerationOptions(stop_token_ids=ids)).result()
    assert (result.text, result.finish_reason, len(result.token_ids)) == (text, reason, kept)


@pytest.mark.parametrize("value", [(-1,), (1.5,), ("a",), (True,), 5, "ab"], ids=str)
def test_impossible_stop_tokens(value: Any) -> None:
    with pytest.raises(InputError, match="stop_token_ids"):
        GenerationOptions(stop_token_ids=value)


def test_stop_tokens_outside_the_vocabulary(session: Session) -> None:
    with pytest.raises(InputError, match="stop_token_ids: 320 is not in a vocabulary of 320"):
        session.generate([[1]], options=GenerationOptions(stop_token_ids=(3, 320)))


@pytest.mark.real_model
def test_real_chat_model_ends_at_its_turn() -> None:
    source = open_source(smollm2())
    ends = check_ends(source.folder, source.config)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends.ids
    assert tokenizer.eos_token_id in ends.ids

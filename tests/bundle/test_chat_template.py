"""Chat templates: the same text and the same tokens as `AutoTokenizer.apply_chat_template`, wherever things lie."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_tokenizers import CHATML, write_json, write_tokenizer
from fetched import smollm2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runtime_models import TinyDecoder, byte_tokenizer
from transformers import AutoTokenizer

from rk_export.errors import InputError
from rk_export.runtime import Session
from rk_export.runtime.chat import ChatTemplate
from rk_export.runtime.text import TextCodec
from rk_export.source.stored import open_source
from rk_export.source.tokenizer_files import copy_tokenizer

USER = [{"role": "user", "content": "How much is 2 < 3?"}]
TALK = [*USER, {"role": "assistant", "content": " yes "}, {"role": "user", "content": "Ça 🍎"}]
TOOLS = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
NAMES = "{{ bos_token }}|{{ eos_token }}|{{ pad_token }}|{{ unk_token }}|{{ image_token }}|{{ messages[0].content }}"


def same(source: Path, folder: Path, messages: list[dict[str, Any]], **arguments: Any) -> str:
    """Assert that the exported folder renders and encodes as transformers does; return the text."""
    if not folder.exists():
        folder.mkdir()
        copy_tokenizer(source, folder)
    options = {"add_generation_prompt": True, **arguments}
    reference = AutoTokenizer.from_pretrained(source)
    expected = reference.apply_chat_template(messages, tokenize=False, **options)
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    text = ChatTemplate.read(folder).render(messages, **options)
    assert text == expected
    codec = TextCodec(folder / "tokenizer.json")
    assert codec.encode(text, special_tokens=False) == ids
    return str(text)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"add_generation_prompt": False},
        {"enable_thinking": False},
        {"tools": TOOLS},
        {"bos_token": "override"},
        {"tools": TOOLS, "documents": [{"title": "t", "text": "x"}]},
    ],
    ids=str,
)
def test_arguments_reach_the_template(tmp_path: Path, arguments: dict[str, Any]) -> None:
    source = write_tokenizer(tmp_path / "source")
    assert same(source, tmp_path / "out", TALK, **arguments) != ChatTemplate.read(source).render(USER)


@pytest.mark.parametrize("content", [" open", "open ", [{"type": "text", "text": "open"}]], ids=str)
@pytest.mark.parametrize("trim", [True, False])
def test_the_last_message_can_be_continued(tmp_path: Path, content: Any, trim: bool) -> None:
    body = "{{ message.content if message.content is string else message.content[0].text }}"
    template = CHATML.replace(
        "{{ message.content | trim }}", body.replace(" }}", " | trim }}") if trim else body
    )
    messages = [*USER, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    text = same(write_tokenizer(tmp_path / "source", template), tmp_path / "out", messages, **options)
    assert text.rstrip().endswith("open")


def test_what_cannot_be_continued_is_refused(tmp_path: Path) -> None:
    template = ChatTemplate.read(write_tokenizer(tmp_path, "{{ messages[0].content }}"))
    for messages in (TALK, [], [{"role": "user"}]):
        with pytest.raises(InputError, match="continue_final_message"):
            template.render(messages, continue_final_message=True)


def named_in_config(folder: Path) -> None:
    write_tokenizer(
        folder, NAMES, bos_token={"__type": "AddedToken", "content": "<bos>"}, image_token="<think>"
    )


def named_in_map(folder: Path) -> None:
    write_tokenizer(folder, NAMES, bos_token=None)
    write_json(folder / "special_tokens_map.json", {"bos_token": {"content": "<bos>"}, "pad_token": "<eos>"})


def named_in_map_only(folder: Path) -> None:
    named_in_map(folder)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": NAMES},
    )


def map_overrides(folder: Path) -> None:
    write_tokenizer(folder, NAMES)
    write_json(folder / "special_tokens_map.json", {"bos_token": "<eos>", "eos_token": None})


def map_is_passed_over(folder: Path) -> None:
    decoder = {"256": {"content": "<bos>", "special": True}}
    write_tokenizer(folder, NAMES, bos_token=None, added_tokens_decoder=decoder)
    write_json(folder / "special_tokens_map.json", {"bos_token": "<bos>"})


def named_by_the_class(folder: Path) -> None:
    write_tokenizer(folder, NAMES, tokenizer_class="GPT2Tokenizer", bos_token=None)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(
        folder / "tokenizer_config.json", {key: config[key] for key in ("tokenizer_class", "chat_template")}
    )


@pytest.mark.parametrize(
    "write",
    [named_in_config, named_in_map, named_in_map_only, map_overrides, map_is_passed_over, named_by_the_class],
)
def test_special_tokens_are_named_as_transformers_names_them(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    write(tmp_path / "source")
    reference = AutoTokenizer.from_pretrained(tmp_path / "source")
    expected = reference.apply_chat_template(USER, tokenize=False)
    (tmp_path / "out").mkdir()
    copy_tokenizer(tmp_path / "source", tmp_path / "out")
    assert ChatTemplate.read(tmp_path / "out").render(USER) == expected
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.special_tokens_map == reference.special_tokens_map


def test_bos_of_the_map_alone_is_written(tmp_path: Path) -> None:
    named_in_map_only(tmp_path / "source")
    assert same(tmp_path / "source", tmp_path / "out", USER).startswith("<bos>|")


def test_tokens_known_to_the_config_alone_are_put_into_the_tokenizer(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source")
    byte_tokenizer().save(str(source / "tokenizer.json"))
    config = json.loads((source / "tokenizer_config.json").read_text())
    texts = {256: "<bos>", 257: "<eos>", 258: "<|im_start|>", 259: "<|im_end|>"}
    decoder = {str(index): {"content": text, "special": True} for index, text in texts.items()}
    write_json(source / "tokenizer_config.json", {**config, "added_tokens_decoder": decoder})
    same(source, tmp_path / "out", TALK)
    assert TextCodec(tmp_path / "out" / "tokenizer.json").encode("<|im_end|>", special_tokens=False) == [259]


def test_templates_in_files_of_their_own(tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "source", "in the config")
    (source / "chat_template.jinja").write_text("file: {{ messages[0].content }}")
    assert same(source, tmp_path / "file", USER).startswith("file")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ tools | length }}")
    assert same(source, tmp_path / "more", USER).startswith("file")
    assert same(source, tmp_path / "more", USER, tools=TOOLS) == "tools: 1"
    (source / "chat_template.jinja").unlink()
    assert same(source, tmp_path / "tools", USER, tools=TOOLS) == "tools: 1"
    with pytest.raises(InputError, match="no template is named 'default', only tool_use"):
        ChatTemplate.read(tmp_path / "tools").render(USER)


def test_several_templates_in_the_config(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    source = write_tokenizer(tmp_path / "source", None, chat_template=templates)
    assert same(source, tmp_path / "out", USER) == "d"
    assert same(source, tmp_path / "out", USER, tools=TOOLS) == "t"
    write_json(source / "tokenizer_config.json", {"chat_template": [{"name": "default"}]})
    with pytest.raises(InputError, match="neither a text nor a list"):
        ChatTemplate.read(source)


def test_a_processors_template_serves_the_tokenizer(tmp_path: Path) -> None:
    source, out = write_tokenizer(tmp_path / "source", None), tmp_path / "out"
    write_json(source / "chat_template.json", {"chat_template": "p{{ messages[0].content }}"})
    out.mkdir()
    copy_tokenizer(source, out)
    text = ChatTemplate.read(out).render(USER)
    assert text == AutoTokenizer.from_pretrained(out).apply_chat_template(USER, tokenize=False)
    assert text.startswith("p")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": 1}]},
        {"role": "assistant", "content": "a", "reasoning": "r"},
        {"role": "assistant", "content": "a", "thinking": "r", "reasoning_content": "s"},
    ],
    ids=str,
)
def test_messages_reach_the_template_alike(tmp_path: Path, message: dict[str, Any]) -> None:
    source = write_tokenizer(tmp_path / "source", "{{ messages | tojson(sort_keys=true) }}")
    same(source, tmp_path / "out", [*USER, message])


_TEXTS = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    ["<|im_end|>", "<bos>a", "</think>", "{{ x }}", " \n"]
)
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant"]), "content": _TEXTS},
        optional={"reasoning_content": _TEXTS | st.none(), "name": _TEXTS},
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ChatTemplate, TextCodec]:
    """One tokenizer in transformers and in the runtime, with a template that writes everything it is given."""
    folder = tmp_path_factory.mktemp("pair")
    template = CHATML + "{{ messages | tojson }}{{ tools }}{{ extra }}{% generation %}g{% endgeneration %}"
    source = write_tokenizer(folder / "source", template)
    (folder / "out").mkdir()
    copy_tokenizer(source, folder / "out")
    codec = TextCodec(folder / "out" / "tokenizer.json")
    return AutoTokenizer.from_pretrained(source), ChatTemplate.read(folder / "out"), codec


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    messages=_MESSAGES,
    prompt=st.booleans(),
    tools=st.none() | st.just(TOOLS) | st.just([]),
    extra=st.none() | st.integers() | _TEXTS | st.lists(st.booleans(), max_size=2),
)
def test_any_conversation(
    pair: tuple[Any, ChatTemplate, TextCodec], messages: Any, prompt: bool, tools: Any, extra: Any
) -> None:
    reference, template, codec = pair
    options = {"add_generation_prompt": prompt, "tools": tools, "extra": extra}
    text = template.render(messages, **options)
    assert text == reference.apply_chat_template(messages, tokenize=False, **options)
    ids = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert codec.encode(text, special_tokens=False) == ids


def test_an_argument_without_effect_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    template = ChatTemplate.read(write_tokenizer(tmp_path))
    for _ in range(2):
        template.render(USER, enable_thinkin=False, enable_thinking=False)
    # `message` is set by a formatter, and the one of the server's log, which a test before may have set up, sets none.
    assert [record.getMessage().partition(" ")[2] for record in caplog.records] == [
        "does not read 'enable_thinkin': it has no effect"
    ]


@pytest.mark.parametrize("name", ["tools", "documents"])
@pytest.mark.parametrize("value", [5, "text", ["a"], {"a": 1}], ids=str)
def test_lists_of_dictionaries(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name}: .* is no list of dictionaries"):
        ChatTemplate.read(write_tokenizer(tmp_path)).render(USER, **{name: value})


@pytest.mark.parametrize(
    "source",
    ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[0].content + 1 }}", "{{ messages[9].a.b }}"],
)
def test_a_failing_template_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match=r"tokenizer_config\.json: the template refuses the messages"):
        ChatTemplate.read(write_tokenizer(tmp_path, source)).render(USER)


def test_a_session_passes_arguments_on(tmp_path: Path) -> None:
    bundle = TinyDecoder().write(tmp_path / "bundle")
    (bundle / "chat_template.jinja").write_text("{{ messages[0].content }}{{ enable_thinking }}{{ tools }}")
    session = Session.from_pretrained(bundle, provider="cpu", threads=1)
    assert session.chat_tokens(USER[:1], enable_thinking="!", tools=[{}]) == [*b"How much is 2 < 3?![{}]"]
    answer = session.chat([{"role": "user", "content": "a"}], enable_thinking="b", tools=[])
    assert answer == session.generate([[*b"ab[]"]])[0]
    # Names of Python's own take nothing away from the template.
    named = {"self": 1, "enable_thinking": "b", "tools": []}
    assert session.chat_tokens([{"role": "user", "content": "a"}], **named) == [*b"ab[]"]
    assert session.chat([{"role": "user", "content": "a"}], **named) == answer


@pytest.mark.real_model
def test_real_tokenizer(tmp_path: Path) -> None:
    source = open_source(smollm2()).folder
    same(source, tmp_path / "out", TALK)
    same(source, tmp_path / "out", USER)
    shutil.rmtree(tmp_path / "out")


# As SmolVLM's: a text that is not in a block is passed over.
OF_BLOCKS = (
    "{% for m in messages %}{{ m['role'] }}:{% for line in m['content'] %}{% if line['type'] == 'text' %}"
    "{{ line['text'] }}{% endif %}{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def test_template_of_a_model_for_images_gets_its_texts_in_blocks(tmp_path: Path) -> None:
    write_tokenizer(tmp_path / "model", chat_template=OF_BLOCKS)
    blocks = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    text = same(tmp_path / "model", tmp_path / "out", blocks)
    template = ChatTemplate.read(tmp_path / "out")
    assert template.render(TALK) == text
    assert "How much is 2 < 3?" in text
    half = [*USER, {"role": "assistant", "content": "It"}]
    assert template.render(half, continue_final_message=True).endswith("assistant:It")

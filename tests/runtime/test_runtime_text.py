"""Incremental decoding, stop strings and chat templates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from runtime_models import BOS, EOS, byte_tokenizer

from rk_export.errors import InputError
from rk_export.runtime.chat import ChatTemplate
from rk_export.runtime.text import StopMatcher, TextCodec, TextStream


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    byte_tokenizer().save(str(path))
    return TextCodec(path)


def test_special_tokens(codec: TextCodec) -> None:
    assert codec.encode("hi") == [BOS, *b"hi"]
    assert codec.encode("hi", special_tokens=False) == [*b"hi"]
    assert codec.decode([BOS, *b"hi", EOS]) == "hi"


def test_pieces_hold_whole_characters(codec: TextCodec) -> None:
    stream = TextStream(codec)
    assert [stream.push(byte) for byte in "aé🍎".encode()] == ["a", "", "é", "", "", "", "🍎"]
    assert stream.flush() == ""


def test_flush_gives_incomplete_characters(codec: TextCodec) -> None:
    stream = TextStream(codec)
    assert [stream.push(byte) for byte in "🍎".encode()[:2]] == ["", ""]
    assert stream.flush() == codec.decode([*"🍎".encode()[:2]])
    assert stream.push(ord("a")) == "a"


@given(text=st.text(max_size=30))
def test_joined_pieces_are_the_text(codec: TextCodec, text: str) -> None:
    stream = TextStream(codec)
    pieces = [stream.push(byte) for byte in text.encode()]
    assert "".join(pieces) + stream.flush() == text


@example(pieces=["a\n"], stops=["\n", "a"])
@example(pieces=["a", "b"], stops=["ab"])
@example(pieces=["xa", "a"], stops=["ab"])
@given(
    pieces=st.lists(st.text("ab\n", max_size=3), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_never_leak(pieces: list[str], stops: list[str]) -> None:
    matcher, shown = StopMatcher(tuple(stops)), ""
    for piece in pieces:
        shown += matcher.push(piece)
        assert not any(stop in shown for stop in stops)
        if matcher.stopped:
            break
    text = "".join(pieces)
    if matcher.stopped:
        assert text.startswith(shown)
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert shown + matcher.flush() == text
        assert not any(stop in text for stop in stops)


def render(source: str, folder: Path, **config: object) -> str:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, **config}))
    return ChatTemplate.read(folder).render([{"role": "user", "content": "<é>"}])


def test_template_functions(tmp_path: Path) -> None:
    assert render("{{ messages | tojson }}", tmp_path) == '[{"role": "user", "content": "<é>"}]'
    assert render("{{ strftime_now('%Y') | length }}", tmp_path) == "4"
    assert (
        render("{{ bos_token }}{{ eos_token }}", tmp_path, bos_token="B", eos_token={"content": "E"}) == "BE"
    )
    assert render("{% generation %}x{% endgeneration %}", tmp_path) == "x"
    assert render("{% for m in messages %}{% break %}{% endfor %}.", tmp_path) == "."


def test_default_of_several_templates(tmp_path: Path) -> None:
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert ChatTemplate.read(tmp_path).render([]) == "d"


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="refuses"):
        render("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", tmp_path)


def test_missing_and_broken_templates(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no chat template"):
        ChatTemplate.read(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(InputError, match=r"chat_template\.jinja: not a valid template"):
        ChatTemplate.read(tmp_path)

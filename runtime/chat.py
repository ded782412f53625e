"""Renders a bundle's chat template with the functions and filters that Hugging Face templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rk_export.errors import InputError
from rk_export.runtime.bundle_config import read_json

Message = Mapping[str, Any]


class ChatTemplate:
    """A compiled chat template; it runs in a sandbox, since it comes with the model.

    Args:
        source: The Jinja text.
        special_tokens: ``bos_token``, ``eos_token`` ... as the template names them.
        where: The file, for error messages.

    Raises:
        InputError: The template has a syntax error.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], where: str) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self._special_tokens, self._where = dict(special_tokens), where
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"not a valid template: {error}", where=where, fix="repair the template"
            ) from error

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate:
        """Read ``chat_template.jinja``, or the template in ``tokenizer_config.json``.

        Raises:
            InputError: The bundle has no chat template, or a broken one.
        """
        config = read_json(folder / "tokenizer_config.json")
        file = folder / "chat_template.jinja"
        if file.is_file():
            return cls(file.read_text(encoding="utf-8"), _special_tokens(config), str(file))
        source = _default_template(config.get("chat_template"))
        if source is None:
            raise InputError("no chat template", where=str(file), fix="use generate with a plain prompt")
        return cls(source, _special_tokens(config), str(folder / "tokenizer_config.json"))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the prompt text of a conversation; it already holds its special tokens.

        Raises:
            InputError: The template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError, KeyError) as error:
            raise InputError(
                f"the template refuses the messages: {error}",
                where=self._where,
                fix="give messages with the roles and fields that this model knows",
            ) from error


class _GenerationBlock(Extension):
    """Renders the body of ``{% generation %}``, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _default_template(value: str | list[dict[str, str]] | None) -> str | None:
    if isinstance(value, list):
        return next((entry["template"] for entry in value if entry.get("name") == "default"), None)
    return value

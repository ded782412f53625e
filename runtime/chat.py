"""Renders a bundle's chat template with the functions and filters that Hugging Face templates expect."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rk_export.errors import InputError
from rk_export.runtime.chat_files import DEFAULT, TOOL_USE, TemplateFiles
from rk_export.runtime.messages import continued, in_blocks, opened, plain_messages
from rk_export.runtime.special_tokens import SpecialTokens

Message = Mapping[str, Any]

logger = logging.getLogger(__name__)

# Stands for a question while a template shows whether it writes one.
_QUESTION = "rkQuestion"

# What a template may do wrong while it runs; it is a program that came with the model.
_FAILURES = (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ChatTemplate:
    """The chat templates of a folder; they run in a sandbox, since they come with the model.

    Args:
        files: The templates' texts by name.
        special_tokens: ``bos_token``, ``eos_token`` ... as the templates name them.

    Raises:
        InputError: The default template has a syntax error.
    """

    def __init__(self, files: TemplateFiles, special_tokens: Mapping[str, str]) -> None:
        self._files, self._special_tokens = files, dict(special_tokens)
        self._warned: set[str] = set()
        self._read: dict[str, frozenset[str]] = {}
        self._blocks: dict[str, bool] = {}
        if DEFAULT in files.sources:
            self._compiled(DEFAULT)

    @classmethod
    def read(cls, folder: Path) -> ChatTemplate:
        """Read the templates of a folder; see `TemplateFiles.read` for where they may lie.

        Raises:
            InputError: The folder has no chat template, or a broken one.
        """
        files = TemplateFiles.read(folder)
        if not files.sources:
            raise InputError(
                "no chat template",
                where=str(folder / "chat_template.jinja"),
                fix="use generate with a plain prompt (on the command line: -p without --chat)",
            )
        return cls(files, SpecialTokens.read(folder).named)

    def render(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        **arguments: Any,
    ) -> str:
        """Return the prompt text of a conversation; it already holds its special tokens.

        Args:
            messages: Dictionaries with ``role``, ``content`` and what else the template reads.
            add_generation_prompt: End with what introduces an answer.
            continue_final_message: End within the last message instead, so that the model goes on with it.
            tools: JSON schemas of functions that the model may call; a template named ``tool_use`` is then taken.
            documents: Dictionaries with ``title`` and ``text``.
            **arguments: Anything else the template reads, such as ``enable_thinking``. They override the special
                tokens. One that the template does not read is warned of.

        Raises:
            InputError: The template refuses the messages, or an argument is no list of dictionaries.
        """
        for name, value in (("messages", messages), ("tools", tools), ("documents", documents)):
            _require_mappings(name, value)
        name = self._name(with_tools=tools is not None)
        given = {"tools": tools, "documents": documents, **arguments}
        self._warn_of_unread(name, {key for key, value in given.items() if value is not None})
        values = {**self._special_tokens, **given, "add_generation_prompt": add_generation_prompt}
        chat = plain_messages(messages)
        if self._reads_blocks_alone(name):
            chat = in_blocks(chat)
        if continue_final_message:
            return continued(self._run(name, opened(chat), {**values, "add_generation_prompt": False}), chat)
        return self._run(name, chat, values)

    def reads(self, argument: str) -> bool:
        """Whether any of the templates reads an argument, such as ``tools``."""
        return any(argument in self._arguments(name) for name in self._files.sources)

    def _arguments(self, name: str) -> frozenset[str]:
        if name not in self._read:
            parsed = _environment().parse(self._files.sources[name])
            self._read[name] = frozenset(meta.find_undeclared_variables(parsed))
        return self._read[name]

    def _reads_blocks_alone(self, name: str) -> bool:
        """Whether a template passes over a text that is not in a block, as some of models for images do."""
        if name not in self._blocks:
            plain: list[dict[str, Any]] = [{"role": "user", "content": _QUESTION}]
            self._blocks[name] = not self._writes(name, plain) and self._writes(name, in_blocks(plain))
        return self._blocks[name]

    def _writes(self, name: str, messages: list[dict[str, Any]]) -> bool:
        values = {**self._special_tokens, "add_generation_prompt": True}
        try:
            return _QUESTION in self._run(name, messages, values)
        except InputError:
            return False

    def _run(self, name: str, messages: list[dict[str, Any]], values: Mapping[str, Any]) -> str:
        try:
            return self._compiled(name).render({**values, "messages": messages})
        except (*_FAILURES, RecursionError, MemoryError) as error:
            raise InputError(
                f"the template refuses the messages: {error}",
                where=self._files.where(name),
                fix="give messages with the roles and fields that this model knows",
            ) from error

    def _name(self, *, with_tools: bool) -> str:
        if with_tools and TOOL_USE in self._files.sources:
            return TOOL_USE
        if DEFAULT not in self._files.sources:
            raise InputError(
                f"no template is named {DEFAULT!r}, only {', '.join(sorted(self._files.sources))}",
                where=self._files.where(DEFAULT),
                fix="name one of them so" + ("" if with_tools else ", or give tools"),
            )
        return DEFAULT

    def _compiled(self, name: str) -> jinja2.Template:
        try:
            return _compile(self._files.sources[name])
        except (jinja2.TemplateError, RecursionError) as error:
            where = self._files.where(name)
            raise InputError(
                f"not a valid template: {error}", where=where, fix="repair the template"
            ) from error

    def _warn_of_unread(self, name: str, given: set[str]) -> None:
        """Say once which arguments have no effect."""
        if not given - self._warned:
            return
        for argument in sorted(given - self._arguments(name) - self._warned):
            logger.warning("%s does not read %r: it has no effect", self._files.where(name), argument)
        self._warned |= given


class _GenerationBlock(Extension):
    """Renders the body of ``{% generation %}``, which marks the assistant's text for training."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> Node | list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _require_mappings(name: str, value: Any) -> None:
    fits = isinstance(value, Sequence) and all(isinstance(item, Mapping) for item in value)
    if value is not None and not fits:
        raise InputError(f"{value!r} is no list of dictionaries", where=name, fix="give a list of them")

"""A conversation with a bundle, on a terminal or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, cast

from rk_export.errors import InputError

try:
    import readline  # edits and recalls lines, where Python has it
except ImportError:
    readline = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from rk_export.runtime import Generation, GenerationOptions, Session

_PROMPT = "> "
_HELP = "Ctrl-C stops an answer; /reset forgets the conversation; /exit, Ctrl-D or Ctrl-C at an empty prompt leaves"


class Conversation:
    """The messages so far, kept short enough for the model's context.

    Args:
        session: The open bundle.
        options: How to choose tokens and when to end.
        system: The system message, or nothing.
        template_args: Arguments of the chat template.

    Raises:
        InputError: The bundle has no chat template, or its template refuses the system message or an argument.
    """

    def __init__(
        self,
        session: Session,
        options: GenerationOptions,
        system: Sequence[Mapping[str, Any]],
        template_args: Mapping[str, Any],
    ) -> None:
        self._session, self._options = session, options
        self._system, self._template_args = list(system), dict(template_args)
        self._turns: list[list[dict[str, Any]]] = []  # user's and assistant's message
        self._tokens([{"role": "user", "content": "?"}])  # refuses now what would be refused at every message

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        """What the next answer will be given after."""
        return [*self._system, *(message for turn in self._turns for message in turn)]

    def reset(self) -> None:
        """Forget everything but the system message."""
        self._turns.clear()

    def ask(self, text: str) -> Generator[str, None, None]:
        """Yield the pieces of the answer; a part of it that came before an interruption is remembered too.

        Raises:
            InputError: The message alone leaves no room for an answer, or the template refuses it.
        """
        question = {"role": "user", "content": text}
        prompt = self._fitting(question)
        pieces: list[str] = []
        ended: Generation | None = None
        try:
            ended = yield from _kept(self._session.stream(prompt, self._options), pieces)
        finally:
            if pieces or ended is not None:
                self._turns.append([question, {"role": "assistant", "content": "".join(pieces)}])
        if ended.finish_reason == "length":
            say(f"cut after {len(ended.token_ids)} tokens; --max-new-tokens and the context are the limits")

    def _fitting(self, question: dict[str, Any]) -> list[int]:
        """Return the prompt's tokens; drop the oldest turns where they leave too little room for an answer."""
        context = self._session.max_length
        room = min(self._options.max_new_tokens, context // 4)
        dropped = 0
        while len(prompt := self._tokens([question])) > context - room and self._turns:
            self._turns.pop(0)
            dropped += 1
        if dropped:
            say(f"the context of {context} tokens is full: the oldest {dropped} of the turns are forgotten")
        return prompt

    def _tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        return self._session.chat_tokens([*self.messages, *messages], **self._template_args)


def _kept(answer: Generator[str, None, Generation], pieces: list[str]) -> Generator[str, None, Generation]:
    """Pass an answer on and keep its pieces."""
    while True:
        try:
            piece = next(answer)
        except StopIteration as end:
            return cast("Generation", end.value)
        pieces.append(piece)
        yield piece


def chat(conversation: Conversation) -> int:
    """Answer the lines of standard input until it ends; return the exit status.

    Raises:
        InputError: A line of a pipe cannot be answered; on a terminal that is said, and the chat goes on.
    """
    if not sys.stdin.isatty():
        for line in _piped_lines():
            _answer(conversation, line)
        return 0
    say(_HELP)
    for line in _typed_lines():
        if line == "/reset":
            conversation.reset()
            say("forgotten")
        elif line == "/help":
            say(_HELP)
        else:
            _answer_on_terminal(conversation, line)
    return 0


def say(text: str) -> None:
    """Tell the user something that is no answer."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def _answer(conversation: Conversation, line: str) -> None:
    with closing(conversation.ask(line)) as answer:
        for piece in answer:
            print(piece, end="", flush=True)
    print(flush=True)


def _answer_on_terminal(conversation: Conversation, line: str) -> None:
    try:
        _answer(conversation, line)
    except KeyboardInterrupt:
        print(flush=True)
        say("stopped")
    except InputError as error:
        say(str(error))


def _piped_lines() -> Iterator[str]:
    try:
        for line in sys.stdin:
            if line := line.strip():
                yield line
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error})", where="standard input", fix="encode it as UTF-8") from error


def _typed_lines() -> Iterator[str]:
    """Yield what is typed, without empty lines, until the end of input, ``/exit`` or an interrupt of an empty one."""
    while True:
        try:
            line = _typed().strip()
        except UnicodeDecodeError as error:
            say(f"not UTF-8: {error}")
            continue
        except (EOFError, KeyboardInterrupt) as left:
            print(flush=True)
            if isinstance(left, KeyboardInterrupt) and _half_typed():
                continue
            return
        if line in ("/exit", "/quit"):
            return
        if line:
            yield line


def _typed() -> str:
    """Return a typed line; where the answers go to a file, the prompt does not."""
    if sys.stdout.isatty():
        return input(_PROMPT)
    print(_PROMPT, end="", file=sys.stderr, flush=True)
    return input()


def _half_typed() -> bool:
    """Whether the line that was interrupted held something; never without readline, which cannot be asked."""
    return readline is not None and bool(readline.get_line_buffer().strip())

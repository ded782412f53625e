"""What clients send to ``/v1``: the fields of OpenAI's interface that are supported, and a few that others added."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import Field, model_validator

from rk_export.runtime.options import GenerationOptions
from rk_export.runtime.server.errors import bad_request
from rk_export.runtime.server.reading import Strict

_MOST_STOPS, _LONGEST_STOP = 16, 256
_MOST_STOP_TOKENS = 64
_MOST_MESSAGES, _MOST_TOOLS = 4096, 128
T = TypeVar("T")
# Lists end at their first misfit: pydantic would otherwise make an error of each element in each branch of a union.
Items = Annotated[list[T], Field(fail_fast=True)]
# A larger number would be refused by the tokenizer or the graph, in words that do not name the field.
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
_MOST_TOKENS = 1 << 31
Role = Literal["system", "developer", "user", "assistant", "tool"]


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # there is none to leave out


class Accepted(Strict):
    """Fields that change nothing in the answer, and those that would and are refused unless they are neutral."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @classmethod
    def known_fields(cls) -> set[str]:
        """Return the names of the fields, with those of `neutral`."""
        return super().known_fields() | cls.neutral.keys()

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        """Drop the fields of `neutral` where they ask for nothing.

        Raises:
            ApiError: One asks for something.
        """
        if not isinstance(values, dict):
            return values
        for name in values.keys() & cls.neutral.keys():
            if values[name] is not None and values[name] not in cls.neutral[name]:
                raise bad_request(f"{name} is not supported; leave it out", name, "unsupported_parameter")
        return {name: value for name, value in values.items() if name not in cls.neutral}


class Sampling(Accepted):
    """Fields of completions and chats alike."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    n: int | None = Field(default=None, ge=1)
    stop: str | Annotated[list[str], Field(fail_fast=True, max_length=_MOST_STOPS)] | None = None
    stop_token_ids: list[int] | None = Field(default=None, fail_fast=True, max_length=_MOST_STOP_TOKENS)
    max_tokens: int | None = Field(default=None, ge=1, le=_MOST_TOKENS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options goes with stream", "stream_options")
        if len(self.stops) > _MOST_STOPS or any(len(stop) > _LONGEST_STOP for stop in self.stops):
            raise bad_request(f"give at most {_MOST_STOPS} stops of {_LONGEST_STOP} characters", "stop")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def samples(self) -> int:
        """Answers to one prompt."""
        return self.n or 1

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def options(self, max_new_tokens: int, logprobs: int | None) -> GenerationOptions:
        """Return how tokens are chosen; OpenAI's temperature is 1 unless it is given.

        Raises:
            InputError: A value is out of its range.
        """
        return GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(0, self.top_k or 0) if self.top_k == -1 else self.top_k or 0,
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            stop=self.stops,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            seed=None if self.seed is None else self.seed % (1 << 64),
            logprobs=logprobs,
        )


class CompletionRequest(Sampling):
    """Body of ``POST /v1/completions``."""

    prompt: str | Items[str] | Items[TokenId] | Items[Items[TokenId]]
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = None

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "suffix": ("",),
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
    }

    @model_validator(mode="after")
    def _check_completion(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != self.samples:
            raise bad_request(
                "best_of is supported only where it equals n", "best_of", "unsupported_parameter"
            )
        if self.echo and self.logprobs is not None:
            raise bad_request("echo cannot go with logprobs", "echo", "unsupported_parameter")
        return self


class FunctionCall(Strict):
    """A function that an assistant called; its arguments are JSON in a string."""

    name: str
    arguments: str


class ToolCall(Strict):
    """One call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None  # clients repeat what a stream brought


class ChatMessage(Strict):
    """One message of a conversation."""

    role: Role
    content: str | Items[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, fail_fast=True, max_length=_MOST_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # Fields of OpenAI's answers that clients send back; they say nothing to a template.
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may use."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """Name of a function."""

    name: str


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Strict):
    """A schema that an answer keeps."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """The form of an answer."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise bad_request("json_schema goes with type json_schema", "response_format.json_schema")
        return self


class ChatRequest(Sampling):
    """Body of ``POST /v1/chat/completions``."""

    messages: list[ChatMessage] = Field(fail_fast=True, min_length=1, max_length=_MOST_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=_MOST_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(default=None, fail_fast=True, max_length=_MOST_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "frequency_penalty": (0,),
        "presence_penalty": (0,),
        "logit_bias": ({},),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
        "functions": ([],),
        "function_call": ("none", "auto"),
    }

    @model_validator(mode="after")
    def _check_chat(self) -> ChatRequest:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise bad_request("give max_tokens or max_completion_tokens", "max_tokens")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs goes with logprobs", "top_logprobs")
        forced = self.tool_choice is not None and self.tool_choice not in ("none", "auto")
        if forced and not self.tools:
            raise bad_request("tool_choice goes with tools", "tool_choice")
        if forced and self.response_format is not None and self.response_format.type != "text":
            raise bad_request("a call that is required has its own form", "response_format")
        return self


class EmbeddingRequest(Accepted):
    """Body of ``POST /v1/embeddings``."""

    model: str
    input: str | Items[str] | Items[TokenId] | Items[Items[TokenId]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1)
    prompt_name: str | None = None

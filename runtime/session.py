"""A decoder bundle, opened and ready: plain forward passes, generation, streaming and chat."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rk_export.errors import InputError, ProviderError
from rk_export.manifest import check_manifest
from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.cache import Cache, GrowingCache, SharedCache
from rk_export.runtime.chat import ChatTemplate, Message
from rk_export.runtime.decoder import Decoder, position_ids
from rk_export.runtime.engine.batch import run_rows
from rk_export.runtime.engine.open_batch import measured_row_multiple, open_batch
from rk_export.runtime.engine.records import Constraint, EngineOptions
from rk_export.runtime.engine.slots import SlotBuffers, SlotRunner
from rk_export.runtime.generate import Row
from rk_export.runtime.graph_proto import GraphFacts, read_facts
from rk_export.runtime.layout import LOGITS_START, DecoderLayout
from rk_export.runtime.options import Generation, GenerationOptions
from rk_export.runtime.providers import Provider, SessionSettings, device_of, open_session
from rk_export.runtime.rotation import check_rotation
from rk_export.runtime.text import TextCodec
from rk_export.runtime.token_gate import TokenGate

Prompt = str | Sequence[int]
Past = tuple[np.ndarray, ...]

logger = logging.getLogger(__name__)

_GREEDY = GenerationOptions()
_TOGETHER = 16  # rows that `generate` runs together, at most


class Session:
    """One open bundle. Threads may share it: every generation has buffers of its own.

    Args:
        session: An open ``onnxruntime.InferenceSession``.
        config: The bundle's configuration.
        max_length: Most positions of prompt and new tokens together; None takes the model's context length.

    Raises:
        InputError: The graph is no decoder, or no context length is known.
    """

    def __init__(self, session: Any, config: BundleConfig, *, max_length: int | None = None) -> None:
        self.config = config
        self.layout = DecoderLayout.of(session, config)
        self.device = device_of(session)
        self.max_length = _length_limit(config, max_length)
        self._session = session

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        provider: Provider = "auto",
        threads: int | None = None,
        accuracy_level: int | None = None,
        spinning: bool = True,
        max_length: int | None = None,
        check: bool = False,
    ) -> Session:
        """Open a bundle folder.

        Args:
            path: A folder with ``model.onnx`` and its configuration.
            provider: ``auto`` takes CUDA where it works and the CPU, with a notice, elsewhere.
            threads: Threads within one operator; None lets ONNX Runtime decide.
            accuracy_level: 0 or 4 overrides the attribute of every ``MatMulNBits``.
            spinning: Threads that wait for work keep their core busy; else they sleep, which is slower on free cores.
            max_length: Most positions of prompt and new tokens together.
            check: First compare size and SHA-256 of every file with the bundle's manifest.

        Raises:
            InputError: A file is missing, broken or, with ``check``, changed, or an option out of range.
            ProviderError: CUDA was asked for and cannot run this bundle here.
        """
        if check:
            check_manifest(path)
        config = BundleConfig.read(path)
        settings = SessionSettings(provider, threads, accuracy_level, spinning)
        session = cls(open_session(config.model_path, settings), config, max_length=max_length)
        if session.device == "cpu" or not session._needs_cpu:
            return session
        obstacle = "GroupQueryAttention has no float32 kernel on CUDA"
        if provider == "cuda":
            fix = "export the bundle in fp16, or give provider='cpu'"
            raise ProviderError(obstacle, where=str(config.model_path), fix=fix)
        logger.warning("running on the CPU execution provider: %s", obstacle)
        on_cpu = replace(settings, provider="cpu")
        return cls(open_session(config.model_path, on_cpu), config, max_length=max_length)

    def forward(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, past: Past | None = None
    ) -> tuple[np.ndarray, Past]:
        """Run the graph once, without shared buffers; meant for parity checks.

        Args:
            input_ids: [batch, length].
            attention_mask: [batch, past length + length]; None masks nothing.
            past: Present of an earlier call: key and value of each layer in turn, then the states of layers without
                attention; None for the first call.

        Returns:
            Logits [batch, length, vocabulary] and the present, in the types of the graph.

        Raises:
            InputError: A token has no row in the embedding, there are more than the context takes, or LongRoPE
                rotates the rows, or the past and the rest, differently; see `check_rotation`.
        """
        outputs = ["logits", *self.layout.presents]
        logits, *present = self._session.run(outputs, self._feeds(input_ids, attention_mask, past))
        return logits, tuple(present)

    def prefill_logits(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, *, start: int = 0
    ) -> np.ndarray:
        """Return the logits of the positions from ``start`` on, [batch, length - start, vocabulary].

        They have the type of the graph. A graph that can leave out positions does not compute those before.

        Raises:
            InputError: As `forward`.
        """
        feeds = self._feeds(input_ids, attention_mask, None)
        skips = start > 0 and self.layout.logits_start
        if skips:
            feeds[LOGITS_START] = np.array([start], np.int64)
        logits: np.ndarray = self._session.run(["logits"], feeds)[0]
        return logits if skips else logits[:, start:]

    def decoder(self, *, batch: int, capacity: int) -> Decoder:
        """Return fresh decoding state for ``batch`` rows of at most ``capacity`` positions.

        Raises:
            InputError: The model does not have that many positions.
        """
        if capacity > self.max_length:
            raise InputError(
                f"{capacity} positions do not fit into a context of {self.max_length}",
                where="capacity",
                fix=f"give at most {self.max_length}",
            )
        cache: Cache
        if self._shares_cache:
            cache = SharedCache(self.layout, batch=batch, capacity=capacity, device=self.device)
        else:
            cache = GrowingCache(self.layout, batch=batch, device=self.device)
        switch = self.config.rotary_switch
        return Decoder(self._session, self.layout, cache, capacity=capacity, switch=switch, rows=self.rows)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, options: GenerationOptions = _GREEDY
    ) -> list[Generation]:
        """Continue one prompt or a batch of prompts.

        Args:
            prompts: A text, a list of texts, token ids, or a list of token id lists.
            options: How to choose tokens and when to end.

        Returns:
            One generation per prompt, in order. Each is the generation that its prompt gets alone, see
            `rk_export.runtime.engine`; a graph that cannot run rows of unequal length together runs them one by one.

        Raises:
            InputError: A prompt is empty, has a token without a row in the embedding, or leaves no room for a new
                token.
        """
        rows = [
            self.row(prompt, options, index=index, where=f"prompt {index}")
            for index, prompt in enumerate(_as_batch(prompts))
        ]
        for _ in self._run(rows):
            pass
        return [row.result() for row in rows]

    def stream(
        self, prompt: Prompt, options: GenerationOptions = _GREEDY
    ) -> Generator[str, None, Generation]:
        """Continue one prompt and yield the pieces of the text that ``generate`` returns.

        Returns:
            What ``generate`` returns, as the generator's value.

        Raises:
            InputError: The prompt is empty or leaves no room for a new token.
        """
        row = self.row(prompt, options)
        for _ in self._run([row]):
            if piece := row.new_text():
                yield piece
        return row.result()

    def chat(
        self, messages: Sequence[Message], /, options: GenerationOptions = _GREEDY, **template_args: Any
    ) -> Generation:
        """Answer a conversation.

        Args:
            messages: Dictionaries with ``role`` and ``content``, as the bundle's chat template takes them.
            options: How to choose tokens and when to end.
            **template_args: As in `ChatTemplate.render`: ``tools``, ``documents``, ``continue_final_message`` and
                what else the template reads, such as ``enable_thinking``.

        Raises:
            InputError: The bundle has no chat template, or the template refuses the messages.
        """
        return self.generate([self.chat_tokens(messages, **template_args)], options=options)[0]

    def chat_tokens(self, messages: Sequence[Message], /, **template_args: Any) -> list[int]:
        """Return the prompt tokens of a conversation, ready for ``generate`` or ``stream``; arguments as in `chat`."""
        # The template writes the special tokens itself.
        text = self.chat_template.render(messages, **template_args)
        return self.text_codec.encode(text, special_tokens=False)

    def row(
        self,
        prompt: Prompt,
        options: GenerationOptions,
        *,
        index: int = 0,
        length: int | None = None,
        constraint: Constraint | None = None,
        where: str = "prompt",
    ) -> Row:
        """Return a row that is ready to run.

        Args:
            prompt: A text or token ids.
            options: How to choose tokens and when to end.
            index: Number among the rows that share a seed.
            length: Most positions of prompt and new tokens; None takes the session's limit.
            constraint: Which tokens may come next.
            where: What the prompt is called in messages.

        Raises:
            InputError: The prompt is empty, has a token without a row in the embedding, or leaves no room for a new
                token.
        """
        tokens = self.text_codec.encode(prompt) if isinstance(prompt, str) else list(prompt)
        TokenGate(self.rows, text_of=self._token_text).check(tokens, where=where)
        length = length or self.max_length
        if len(tokens) >= length:
            raise InputError(
                f"{len(tokens)} tokens leave no room in a context of {length}",
                where=where,
                fix=self._more_room(length),
            )
        self._check_stop_tokens(options)
        needs_text = bool(options.stop) or (self.config.folder / TOKENIZER_FILE).is_file()
        return Row(
            tokens,
            options,
            self.text_codec if needs_text else None,
            self.config.eos_ids,
            index,
            limit=length - len(tokens),
            constraint=constraint,
        )

    def slot_runner(self, buffers: SlotBuffers) -> SlotRunner:
        """Return what runs this bundle's graph over slots."""
        return SlotRunner(self._session, self.layout, buffers)

    @cached_property
    def takes_slots(self) -> bool:
        """Whether rows of unequal length can run together, each with a slot of a common cache."""
        return self._shares_cache and self._facts.row_lengths

    @property
    def rows_are_independent(self) -> bool:
        """Whether a row is computed to the same bit whatever rows run beside it, on this processor."""
        return self._measured_multiple is not None

    @cached_property
    def row_multiple(self) -> int:
        """Rows of a step are filled up to a multiple of this, so that none depends on the others; found by trying."""
        if self._measured_multiple is None:
            logger.warning(
                "%s: this processor rounds a row otherwise beside other rows: an answer may depend on the requests "
                "that run beside it",
                self.config.folder,
            )
        return self._measured_multiple or 1

    @cached_property
    def _measured_multiple(self) -> int | None:
        return measured_row_multiple(self)

    @cached_property
    def rows(self) -> int | None:
        """Token ids that the model knows: the rows of its embedding; None where neither graph nor config tells."""
        found = self._facts.embedding_rows
        return self.config.vocab_size if found is None else found

    @cached_property
    def text_codec(self) -> TextCodec:
        """The bundle's tokenizer."""
        return TextCodec(self.config.folder / TOKENIZER_FILE)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The bundle's chat template."""
        return ChatTemplate.read(self.config.folder)

    @cached_property
    def _facts(self) -> GraphFacts:
        return read_facts(self.config.model_path)

    @cached_property
    def _shares_cache(self) -> bool:
        declared = self.config.shared_cache
        return self._facts.shared_cache if declared is None else declared

    @property
    def _needs_cpu(self) -> bool:
        # Off its device, the attention would copy the whole cache to the CPU and back in every step.
        return self._shares_cache and self.layout.cache_dtype == np.float32

    def _feeds(
        self, input_ids: np.ndarray, attention_mask: np.ndarray | None, past: Past | None
    ) -> dict[str, np.ndarray]:
        batch, length = input_ids.shape
        cached = 0 if past is None else past[0].shape[2]
        TokenGate(self.rows, self.max_length).check(input_ids, past=cached)
        past = self.layout.empty_past(batch) if past is None else past
        if attention_mask is None:
            attention_mask = np.ones((batch, cached + length), np.int64)
        check_rotation(attention_mask, cached, self.config.rotary_switch)
        feeds = {
            "input_ids": input_ids.astype(np.int64, copy=False),
            "attention_mask": attention_mask.astype(np.int64, copy=False),
            **dict(zip(self.layout.pasts, past, strict=True)),
        }
        if self.layout.position_ids:
            feeds["position_ids"] = position_ids(feeds["attention_mask"])[:, -length:]
        return feeds

    def _token_text(self, token: int) -> str | None:
        has_tokenizer = (self.config.folder / TOKENIZER_FILE).is_file()
        return self.text_codec.token_text(token) if has_tokenizer else None

    def _check_stop_tokens(self, options: GenerationOptions) -> None:
        size = self.config.vocab_size
        outside = [token for token in options.stop_token_ids if size is not None and token >= size]
        if outside:
            raise InputError(
                f"{outside[0]} is not in a vocabulary of {size}",
                where="stop_token_ids",
                fix=f"give ids below {size}",
            )

    def _more_room(self, length: int) -> str:
        """What a user can do about a prompt that is too long."""
        shorter = f"shorten the prompt to {length - 1} tokens or less"
        context = self.config.context_length
        if context is None or length < context:
            return f"{shorter}, or open the session with a larger max_length"
        return f"{shorter}, or export the model again with a larger --context-length, where it allows one"

    def _run(self, rows: Sequence[Row]) -> Iterator[None]:
        """Run rows to their end, yielding after each step."""
        if not rows:
            return
        needed = max(len(row.prompt) + row.limit for row in rows)
        slots = min(len(rows), _TOGETHER)
        batch, _ = open_batch(self, EngineOptions(slots=slots, capacity=needed, kept_prefixes=0))
        yield from run_rows(batch, rows)


def _as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) > 0 and not isinstance(prompts[0], str) and np.ndim(prompts[0]) == 0:
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _length_limit(config: BundleConfig, max_length: int | None) -> int:
    context = config.context_length
    if max_length is None and context is None:
        raise InputError("no context length is known", where=str(config.folder), fix="give max_length")
    if max_length is not None and (max_length < 2 or (context is not None and max_length > context)):
        raise InputError(
            f"{max_length} is out of range", where="max_length", fix=f"give 2 to {context or 'any'}"
        )
    return max_length or context or 0

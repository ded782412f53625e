"""Bundles as a model of EleutherAI's lm-eval 0.4, under the name ``rk-onnx``.

lm-eval looks for models in its own registry only, not among entry points of other packages. Importing this module
registers the model; run as a program, it registers it and passes the command line on to lm-eval::

    python -m rk_export.evaluation.lm_eval_model --model rk-onnx --model_args bundle=DIR --tasks hellaswag
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rk_export.errors import InputError
from rk_export.evaluation.log_likelihood import Continuation, PairEncoder, log_likelihoods
from rk_export.runtime import GenerationOptions, Session
from rk_export.runtime.bundle_files import read_json
from rk_export.runtime.providers import Provider

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise InputError("lm-eval is not installed", fix="pip install lm-eval") from error

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

LM_EVALS_DEFAULT = "cuda:0"  # what its command line passes on when the user named no device

_GENERATED_TOGETHER = 8


@register_model("rk-onnx")
class BundleLM(LM):
    """A decoder bundle, run through `rk_export.runtime.Session`.

    Args:
        bundle: The bundle folder.
        provider: Execution provider; `auto` follows `device`.
        threads: Threads of ONNX Runtime.
        max_length: Most tokens of prompt and answer; None takes the model's context.
        max_gen_toks: Most new tokens where a task does not say.
        device: lm-eval's ``--device``: ``cpu``, ``cuda`` or ``cuda:0``. lm-eval gives ``cuda:0`` where the user gave
            nothing, so that means CUDA where it works and the CPU, with a notice, elsewhere; ``cuda`` insists.
        batch_size: Not used: rows run together as their lengths allow.
        max_batch_size: Not used.

    Raises:
        InputError: The bundle cannot be used, or there is no such device.
        ProviderError: CUDA was asked for and cannot run this bundle here.
    """

    def __init__(
        self,
        bundle: str,
        provider: Provider = "auto",
        threads: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.session = Session.from_pretrained(
            bundle, provider=_provider(provider, device), threads=threads, max_length=max_length
        )
        self.max_gen_toks = max_gen_toks
        self._encoder = PairEncoder(self.session.text_codec, self.session.rows)
        self._start = _start_token(self.session)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-eval caches what the chat template made."""
        return self.session.config.folder.name

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return the prompt of a conversation by the bundle's chat template."""
        return self.session.chat_template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return log likelihood, and whether it is the greedy one, of each continuation given its context."""
        texts = [request.args for request in requests]
        found = self._scores([self._continuation(*pair) for pair in texts])
        for pair, result in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log likelihood of each text, over windows of the model's context, each token once."""
        return [self._rolling(*request.args) for request in requests]

    def _rolling(self, text: str) -> float:
        windows = get_rolling_token_windows(
            list(self._encoder.encode(text)), self._start, self.session.max_length, 1
        )
        pairs = [Continuation(tuple(a), tuple(b)) for a, b in map(make_disjoint_window, windows)]
        total = sum(value for value, _ in self._scores(pairs))
        self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return total

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to its stop strings or number of tokens."""
        asked = [(request.args[0], _options(request.args[1], self.max_gen_toks)) for request in requests]
        texts = dict.fromkeys(range(len(asked)), "")
        for options in dict.fromkeys(options for _, options in asked):
            indices = [index for index, (_, other) in enumerate(asked) if other == options]
            for begin in range(0, len(indices), _GENERATED_TOGETHER):
                some = indices[begin : begin + _GENERATED_TOGETHER]
                prompts = [self._prompt(asked[index][0], options) for index in some]
                texts |= zip(some, self._generated(prompts, options), strict=True)
        for request, text in zip(requests, texts.values(), strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return list(texts.values())

    def _generated(self, prompts: Sequence[list[int]], options: GenerationOptions) -> list[str]:
        return [one.text for one in self.session.generate(prompts, options=options)]

    def _prompt(self, context: str, options: GenerationOptions) -> list[int]:
        """Return the end of the context that leaves room for the new tokens."""
        room = self.session.max_length - options.max_new_tokens
        if room < 1:
            raise InputError(
                f"{options.max_new_tokens} new tokens leave no room for a prompt",
                where="max_gen_toks",
                fix=f"give less than {self.session.max_length}",
            )
        return list(self._encoder.with_prefix(self._encoder.encode(context)))[-room:]

    def _continuation(self, context: str, continuation: str) -> Continuation:
        if context.strip():
            return self._encoder.pair(context, continuation)
        return Continuation((self._start,), self._encoder.encode(context + continuation))

    def _scores(self, pairs: list[Continuation]) -> list[tuple[float, bool]]:
        found = log_likelihoods(
            self.session.prefill_logits,
            pairs,
            max_length=self.session.max_length,
            rotary_switch=self.session.config.rotary_switch,
        )
        return [(one.log_likelihood, one.greedy) for one in found]


def _provider(provider: Provider, device: str | None) -> Provider:
    """Return the execution provider for lm-eval's device; a provider that the user named comes first."""
    if provider != "auto" or device in (None, LM_EVALS_DEFAULT):
        return provider
    if device in ("cpu", "cuda"):
        return "cpu" if device == "cpu" else "cuda"
    fix = "give cpu or cuda"
    if device.startswith("cuda:"):
        fix = f"choose the card by the environment, CUDA_VISIBLE_DEVICES={device.removeprefix('cuda:')}, and give cuda"
    raise InputError(f"a bundle cannot run on {device!r}", where="--device", fix=fix)


def insist_on_device(arguments: Sequence[str]) -> list[str]:
    """Return lm-eval's command line with a named ``cuda:0`` as ``cuda``: it is no longer taken for the default.

    Args:
        arguments: The command line, without the program's name.
    """
    return [
        argument.replace(LM_EVALS_DEFAULT, "cuda")
        if argument == f"--device={LM_EVALS_DEFAULT}"
        or (before == "--device" and argument == LM_EVALS_DEFAULT)
        else argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
    ]


def _start_token(session: Session) -> int:
    """Return the token that stands before a text without context: beginning of sequence, else end of text."""
    config = read_json(Path(session.config.folder) / "config.json")
    bos = (config.get("text_config") or config).get("bos_token_id")
    if bos is None and not session.config.eos_ids:
        raise InputError(
            "names neither bos_token_id nor eos_token_id", where="config.json", fix="add one of them"
        )
    return int(bos if bos is not None else min(session.config.eos_ids))


def _options(kwargs: dict[str, Any], max_new_tokens: int) -> GenerationOptions:
    """Return lm-eval's generation arguments as ours; without ``do_sample`` decoding is greedy."""
    until = kwargs.get("until") or []
    return GenerationOptions(
        max_new_tokens=int(kwargs.get("max_gen_toks", max_new_tokens)),
        temperature=float(kwargs.get("temperature", 1.0)) if kwargs.get("do_sample") else 0.0,
        top_k=int(kwargs.get("top_k", 0)),
        top_p=float(kwargs.get("top_p", 1.0)),
        min_p=float(kwargs.get("min_p", 0.0)),
        repetition_penalty=float(kwargs.get("repetition_penalty", 1.0)),
        stop=tuple(text for text in ([until] if isinstance(until, str) else until) if text),
        seed=0,
    )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = insist_on_device(sys.argv[1:])
    cli_evaluate()

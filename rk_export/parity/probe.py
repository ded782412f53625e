"""The fixed prompts that parity is measured on."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rk_export.model.context import PROMPT_LENGTH
from rk_export.model.switches import CROSSED_BY_RUNTIME, LONG_ROTATION, WINDOW, Switch
from rk_export.runtime.text import TextCodec
from rk_export.runtime.token_gate import TokenGate

NEW_TOKENS = 64
DECODE_FROM = 8
# A text that crosses a switch is decoded from so many tokens before it to so many after it.
BEFORE, AFTER = 8, 16
# Longer texts cost more time and memory than a check before every bundle should.
LONGEST = 4608
_SEED = 20240216

# Prose, a list, arithmetic, code, a dialogue, another language: short texts that leave different tokens likely.
TEXTS = (
    "The harbour was quiet in the early morning, and only the gulls moved between the masts. A woman in a grey coat "
    "walked along the quay, counted the boats, and wrote their names into a small notebook.",
    "To bake bread you need four things: flour, water, salt and time. First mix the flour with the water and let it "
    "rest for half an hour. Then add the salt, fold the dough, and wait until it has doubled.",
    "If a train leaves at 9:15 and travels 120 kilometres at 80 kilometres per hour, it arrives at 10:45. If it "
    "travels at 60 kilometres per hour instead, it needs 2 hours and therefore arrives at",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if len(ordered) % 2 == 1:\n"
    "        return ordered[middle]\n    return (ordered[middle - 1] + ordered[middle]) / 2\n\n\ndef mean(values):\n",
    "Question: Why is the sky blue during the day and red in the evening?\nAnswer: Sunlight is scattered by the "
    "molecules of the air, and short waves are scattered more strongly than long ones. In the evening",
    "The committee met on Tuesday to discuss the budget for the coming year. Three members argued for a new library, "
    "two for repairs to the bridge, and the chair proposed that both should be",
    "Le petit village se trouve au bord d'une rivière. Chaque dimanche, les habitants se réunissent sur la place pour "
    "le marché, où l'on vend du pain, du fromage et des",
    "Water boils at 100 degrees Celsius at sea level. On a high mountain the pressure of the air is lower, so water "
    "boils at a lower temperature, and cooking an egg takes longer. For example,",
)


@dataclass(frozen=True)
class Crossing:
    """A text that crosses one switch of the model.

    Args:
        tokens: Its token ids; a single row.
        start: How many of them stand before the switch: decoding from there crosses it.
        switch: What is crossed.
    """

    tokens: tuple[int, ...]
    start: int
    switch: Switch


@dataclass(frozen=True)
class Probe:
    """Prompts as tokens.

    Args:
        prompts: Token ids of each prompt, `PROMPT_LENGTH` each.
        crossings: Longer or shorter texts for the switches that those prompts do not cross.
        uncrossed: Switches that no text crosses, each with the reason.
    """

    prompts: tuple[tuple[int, ...], ...]
    crossings: tuple[Crossing, ...] = ()
    uncrossed: tuple[tuple[Switch, str], ...] = ()

    @property
    def batch(self) -> np.ndarray:
        """All prompts, int64 (prompts, length)."""
        return np.array(self.prompts, dtype=np.int64)

    def unequal(self) -> tuple[tuple[int, ...], ...]:
        """The prompts cut to different lengths, for the test of left padding."""
        return tuple(prompt[: max(2, len(prompt) - 3 * index)] for index, prompt in enumerate(self.prompts))

    def crossed(self) -> str:
        """What is crossed beside the prompts, and what is not, in words."""
        crossed = "".join(
            f"; one of {len(item.tokens):,} tokens crosses the {item.switch}" for item in self.crossings
        )
        return crossed + "".join(
            f"; the {switch} is not crossed: {reason}" for switch, reason in self.uncrossed
        )


def make_probe(tokenizer_folder: Path, vocabulary: int, switches: tuple[Switch, ...] = ()) -> Probe:
    """Return the probe of a model: the texts, or seeded random tokens where it has no tokenizer.

    Args:
        tokenizer_folder: Where tokenizer.json may lie.
        vocabulary: Number of token ids that the model embeds.
        switches: Lengths at which the model begins to compute otherwise; each is crossed.

    Raises:
        InputError: The tokenizer turns plain text into ids that the model does not embed.
    """
    rows = _texts(tokenizer_folder, vocabulary)
    # Prompts on both sides of a switch would be padded to a batch that is rotated as one.
    rotated = [item.tokens for item in switches if item.name == LONG_ROTATION]
    length = min(PROMPT_LENGTH, *(len(row) for row in rows), *rotated)
    # The common prompts are decoded from `DECODE_FROM` on, and cross a shorter window there.
    wanted = [item for item in switches if item.name != WINDOW or item.tokens > length - DECODE_FROM]
    stream = tuple(itertools.islice(itertools.cycle(itertools.chain(*rows)), LONGEST))
    return Probe(
        tuple(tuple(row[:length]) for row in rows),
        tuple(_crossing(item, stream) for item in wanted if not _obstacle(item)),
        tuple((item, _obstacle(item)) for item in wanted if _obstacle(item)),
    )


def _obstacle(switch: Switch) -> str:
    """Return why a switch is not crossed, or an empty string."""
    if switch.name not in CROSSED_BY_RUNTIME:
        return "the runtime keeps what it cached before"
    return f"beyond {LONGEST:,} tokens" if switch.tokens + AFTER > LONGEST else ""


def _crossing(switch: Switch, stream: tuple[int, ...]) -> Crossing:
    last = min(switch.tokens + AFTER, switch.context)
    return Crossing(stream[:last], max(1, switch.tokens - BEFORE), switch)


def _texts(tokenizer_folder: Path, vocabulary: int) -> list[list[int]]:
    path = tokenizer_folder / "tokenizer.json"
    if not path.is_file():
        draws = np.random.default_rng(_SEED).integers(0, vocabulary, (len(TEXTS), PROMPT_LENGTH))
        return [[int(token) for token in row] for row in draws]
    codec = TextCodec(path)
    # With the tokens that the tokenizer adds: some models (Gemma 3) write nonsense without the one that begins a text.
    rows = [codec.encode(text) for text in TEXTS]
    gate = TokenGate(vocabulary, text_of=codec.token_text)
    for row in rows:
        gate.check(row, where=str(path))
    return rows

"""The README of a bundle: what it is, what was measured, and how each runtime loads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal

from rk_export.bundle.encoder_card import Kind, how_to_run_encoder


@dataclass(frozen=True)
class ModelCard:
    """What the bundle's README says.

    Args:
        name: Name of the bundle.
        base_model: Model id or name of the source.
        ep: Execution provider the graph was made for.
        context_length: Tokens of prompt and answer together.
        summary: One paragraph: what was done to the model.
        results: Rows of measured values, label and text.
        license: License of the weights, None when unknown.
        length_note: Up to which length which runtime generates exactly; None where all do up to the context length.
        ends: Tokens that end a text, as text and id.
        encoder: What an encoder's graph gives; None where the model continues texts.
        carries_states: Layers without attention carry states beside keys and values.
    """

    name: str
    base_model: str
    ep: Literal["cpu", "cuda"]
    context_length: int
    summary: str
    results: tuple[tuple[str, str], ...] = ()
    license: str | None = None
    length_note: str | None = None
    ends: tuple[str, ...] = ()
    encoder: Kind | None = None
    carries_states: bool = False


def model_card(card: ModelCard) -> str:
    """Return the bundle's ``README.md``: what it is, what was measured, how each runtime loads it."""
    rows = "".join(f"| {label} | {value} |\n" for label, value in card.results)
    results = f"\n## Measured\n\n| | |\n| --- | --- |\n{rows}" if rows else ""
    provider = "CUDAExecutionProvider" if card.ep == "cuda" else "CPUExecutionProvider"
    length = "" if card.length_note is None else f"\n## Length\n\n{card.length_note}\n"
    ends = f"\nA text ends at {' or '.join(card.ends)}.\n" if card.ends else ""
    written = ", those that it writes included" if card.encoder is None else ""
    context = f"It takes {card.context_length:,} tokens at most{written}."
    head = f"{_front_matter(card)}\n# {card.name}\n\n{card.summary} {context}\n{ends}{results}{length}\n"
    if card.encoder is not None:
        return head + how_to_run_encoder(card.encoder, provider)
    middle, states = ("", _STATES) if card.carries_states else (_OPTIMUM, "")
    return head + (_HOW_TO_RUN + middle + _PLAIN).format(provider=provider, states=states)


def _front_matter(card: ModelCard) -> str:
    lines = ["---", f"base_model: {json.dumps(card.base_model)}", "tags: [onnx, onnxruntime, rk-export]"]
    if card.license is not None:
        lines.append(f"license: {card.license}")
    return "\n".join([*lines, "---\n"])


_HOW_TO_RUN = """\
`rk_manifest.json` lists every file with its checksum; `report.html` and `plan.json` say what happened to each
matrix.

## Run it

rk-export:

```bash
rk-export run . -p "Where is the Eiffel Tower?" --chat
rk-export serve .          # OpenAI's HTTP interface, for many clients at once
rk-export verify .
```

ONNX Runtime GenAI (`pip install onnxruntime-genai`):

```python
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=256)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Where is the Eiffel Tower?"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```

"""
_OPTIMUM = """\
Optimum (`pip install optimum-onnx[onnxruntime]`):

```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

model = ORTModelForCausalLM.from_pretrained(".", provider="{provider}")
tokenizer = AutoTokenizer.from_pretrained(".")
inputs = tokenizer("Where is the Eiffel Tower?", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
```

"""
_STATES = """\
Layers without attention carry `past_conv.N` (zeros at first), and give `present_conv.N` for the next call. Optimum's
classes do not feed them.
"""
_PLAIN = """\
ONNX Runtime alone: inputs `input_ids`, `attention_mask` (int64, batch x length; the mask covers the past too)
and `past_key_values.N.key|value` (batch x heads x past length x head size, length 0 at first); outputs
`logits` and `present.N.key|value`, which are the next call's past.
{states}
```python
import onnxruntime as ort

session = ort.InferenceSession("model.onnx", providers=["{provider}"])
print([(i.name, i.type, i.shape) for i in session.get_inputs()])
```
"""

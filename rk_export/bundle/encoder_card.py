"""How the README of an encoder's bundle says to run it."""

from __future__ import annotations

from typing import Literal

Kind = Literal["vectors", "states", "texts", "tokens"]

_LISTED = """\
`rk_manifest.json` lists every file with its checksum; `report.html` and `plan.json` say what happened to each
matrix.

## Run it

"""
_VECTORS = """\
rk-export (no PyTorch needed):

```python
from rk_export.runtime import Encoder

print(Encoder(".").encode(["The harbour was quiet.", "The train leaves at nine."]).shape)
```

```bash
rk-export run . -p "The harbour was quiet."
rk-export serve .          # POST /v1/embeddings
```

sentence-transformers (`pip install sentence-transformers[onnx]`):

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(".", backend="onnx")
print(model.encode(["The harbour was quiet.", "The train leaves at nine."]).shape)
```

"""
_TEXTS = """\
rk-export (no PyTorch needed):

```python
from rk_export.runtime import Encoder

encoder = Encoder(".")
print(encoder.classify([("Where are the boats?", "The harbour was quiet.")]))  # a pair, or a text alone
```

Optimum (`pip install optimum-onnx[onnxruntime]`), and sentence-transformers for cross-encoders:

```python
from optimum.onnxruntime import ORTModelForSequenceClassification

model = ORTModelForSequenceClassification.from_pretrained(".", provider="{provider}")
```

"""
_TOKENS = """\
rk-export (no PyTorch needed):

```python
from rk_export.runtime import Encoder

print(Encoder(".").tag(["The harbour was quiet."]))
```

Optimum (`pip install optimum-onnx[onnxruntime]`):

```python
from optimum.onnxruntime import ORTModelForTokenClassification

model = ORTModelForTokenClassification.from_pretrained(".", provider="{provider}")
```

"""
_OUTPUTS = {
    "vectors": "`last_hidden_state` (batch x length x hidden) and `sentence_embedding` (batch x width), pooled as "
    "`modules.json` says",
    "states": "`last_hidden_state` (batch x length x hidden)",
    "texts": "`logits` (batch x labels)",
    "tokens": "`logits` (batch x length x labels)",
}
_PLAIN = """\
ONNX Runtime alone: inputs `input_ids` and `attention_mask` (int64, batch x length), and `token_type_ids` where the
session lists it; output {outputs}.

```python
import onnxruntime as ort

session = ort.InferenceSession("model.onnx", providers=["{provider}"])
print([(i.name, i.type, i.shape) for i in session.get_inputs()])
```
"""


def how_to_run_encoder(kind: Kind, provider: str) -> str:
    """Return the part of the README that says how each runtime loads the bundle.

    Args:
        kind: What the graph gives: vectors of texts, hidden states, labels of texts, or labels of tokens.
        provider: Of ONNX Runtime.
    """
    middle = {"vectors": _VECTORS, "states": _VECTORS, "texts": _TEXTS, "tokens": _TOKENS}[kind]
    return (_LISTED + middle + _PLAIN).format(provider=provider, outputs=_OUTPUTS[kind])

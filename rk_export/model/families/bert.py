"""BERT, an encoder."""

from __future__ import annotations

from rk_export.model.architecture import Architecture
from rk_export.model.families.base import Family, Refused

_NAMES = Architecture(
    "bert",
    layers="encoder.layer",
    embedding="embeddings.word_embeddings",
    lm_head=None,
    onnx_layers="encoder.layer",
    onnx_embedding="embeddings.word_embeddings",
    onnx_lm_head=None,
    is_encoder=True,
    attention=(("q", "attention.self.query"), ("k", "attention.self.key")),
    mlp=(),
    renamed={
        "attention.self": "attention",
        "attention.output": "attention",
        "output.dense": "dense",
        "output.LayerNorm": "LayerNorm",
    },
    outer={"embeddings": "embeddings"},
    unused=("pooler",),
)
_REFUSED = (
    Refused("is_decoder", False, "BERT is exported as an encoder"),
    Refused("add_cross_attention", False, "the exported encoder has no cross attention"),
)
FAMILIES = (Family(_NAMES, refused=_REFUSED),)

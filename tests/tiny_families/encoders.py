"""Bidirectional encoders."""

from tiny_families.entry import TinyFamily

FAMILIES = (
    TinyFamily(
        "bert",
        fields={"type_vocab_size": 2},
        spelled={"num_key_value_heads": None},
        known=("BERT", "all-MiniLM-L6-v2", "BGE"),
        is_encoder=True,
        in_sample=True,
    ),
)

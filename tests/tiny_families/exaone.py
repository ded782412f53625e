"""LG's EXAONE."""

from tiny_families.entry import TinyFamily

FAMILIES = (
    TinyFamily("exaone", fields={"head_dim": 32}, known=("EXAONE 3.0 and 3.5", "EXAONE Deep")),
    TinyFamily(
        "exaone4",
        fields={"head_dim": 32, "num_hidden_layers": 4, "sliding_window": 5},
        variants={"all_rotated": {"sliding_window": None, "layer_types": ["full_attention"] * 4}},
        known=("EXAONE 4.0 (1.2B, 32B)",),
    ),
)

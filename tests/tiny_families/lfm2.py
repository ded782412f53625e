"""Short convolutions beside attention."""

from tiny_families.entry import TinyFamily

FAMILIES = (
    TinyFamily(
        "lfm2",
        fields={
            "num_hidden_layers": 4,
            "layer_types": ["conv", "full_attention", "conv", "full_attention"],
            "block_multiple_of": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        variants={
            "biased": {
                "conv_bias": True,
                "layer_types": ["full_attention", "conv", "conv", "full_attention"],
            },
            "wide": {
                "conv_L_cache": 5,
                "num_hidden_layers": 3,
                "layer_types": ["conv", "conv", "full_attention"],
                "head_dim": 32,
                "block_auto_adjust_ff_dim": False,
                "tie_word_embeddings": False,
            },
        },
        known=("LFM2", "LFM2.5"),
    ),
)

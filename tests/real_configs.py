"""What config.json of published checkpoints says, as far as it decides what is computed; written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Fields = Mapping[str, Any]


def _llama(
    hidden: int, width: int, layers: int, heads: tuple[int, int], vocabulary: int, **more: Any
) -> dict[str, Any]:
    """Return fields in Llama's spelling; of heads those of queries and those of keys and values."""
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        **more,
    }


_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"short_factor": [1.0] * 48, "long_factor": [1.0 + index for index in range(48)]}

# Name of a checkpoint -> its model type and fields.
TAKEN: Mapping[str, tuple[str, Fields]] = {
    "SmolLM2-135M": (
        "llama",
        _llama(576, 1536, 30, (9, 3), 49152, rope_theta=100000.0, tie_word_embeddings=True),
    ),
    "Llama-3.2-1B": (
        "llama",
        _llama(
            *(2048, 8192, 16, (32, 8), 128256),
            head_dim=64,
            rope_theta=500000.0,
            rope_scaling={**_LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192},
            tie_word_embeddings=True,
        ),
    ),
    "Mistral-7B-v0.3": ("mistral", _llama(4096, 14336, 32, (32, 8), 32768, sliding_window=None)),
    "Ministral-8B-2410": (
        "ministral",
        _llama(4096, 12288, 36, (32, 8), 131072, head_dim=128, sliding_window=32768),
    ),
    "Qwen2.5-0.5B": (
        "qwen2",
        _llama(896, 4864, 24, (14, 2), 151936, rope_theta=1e6, tie_word_embeddings=True),
    ),
    "Qwen3-0.6B": ("qwen3", _llama(1024, 3072, 28, (16, 8), 151936, head_dim=128, rope_theta=1e6)),
    "Phi-3.5-mini": (
        "phi3",
        _llama(
            *(3072, 8192, 32, (32, 32), 32064),
            rope_scaling={"type": "longrope", **_LONG},
            original_max_position_embeddings=4096,
            max_position_embeddings=131072,
            sliding_window=262144,
            pad_token_id=32000,
        ),
    ),
    "Phi-4-mini": (
        "phi3",
        _llama(
            *(3072, 8192, 32, (24, 8), 200064),
            partial_rotary_factor=0.75,
            rope_scaling={"type": "longrope", **_LONG},
            original_max_position_embeddings=4096,
            max_position_embeddings=131072,
            sliding_window=262144,
            tie_word_embeddings=True,
            pad_token_id=199999,
        ),
    ),
    "gemma-2-2b": (
        "gemma2",
        _llama(
            *(2304, 9216, 26, (8, 4), 256000),
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
    ),
    "gemma-3-270m": (
        "gemma3_text",
        _llama(
            *(640, 2048, 18, (4, 1), 262144),
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            rope_theta=1e6,
            rope_local_base_freq=10000.0,
        ),
    ),
    "OLMo-2-1B": ("olmo2", _llama(2048, 8192, 16, (16, 16), 100352, rope_theta=500000.0)),
    "Olmo-3-7B": (
        "olmo3",
        _llama(
            *(4096, 11008, 32, (32, 32), 100278),
            sliding_window=4096,
            rope_theta=500000.0,
            rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
        ),
    ),
    "granite-3.3-2b": (
        "granite",
        _llama(
            *(2048, 8192, 40, (32, 8), 49159),
            embedding_multiplier=12.0,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=8.0,
        ),
    ),
    "granite-4.0-micro": (
        "granitemoehybrid",
        _llama(
            *(2560, 8192, 40, (40, 8), 100352),
            shared_intermediate_size=8192,
            num_local_experts=0,
            layer_types=["attention"] * 40,
            position_embedding_type="rope",
            embedding_multiplier=12.0,
            attention_multiplier=0.015625,
            residual_multiplier=0.22,
            logits_scaling=10.0,
        ),
    ),
    "SmolLM3-3B": ("smollm3", _llama(2048, 11008, 36, (16, 4), 128256, rope_theta=5e6, pad_token_id=128004)),
    "starcoder2-3b": ("starcoder2", _llama(3072, 12288, 30, (24, 2), 49152, sliding_window=4096)),
    "gpt2": ("gpt2", {}),
    "opt-125m": ("opt", {}),
    "phi-2": ("phi", _llama(2560, 10240, 32, (32, 32), 51200, partial_rotary_factor=0.4)),
    "Command R7B": (
        "cohere2",
        _llama(4096, 14336, 32, (32, 8), 256000, sliding_window=4096, logit_scale=0.25, rope_theta=50000.0),
    ),
    "aya-23-8B": ("cohere", _llama(4096, 14336, 32, (32, 8), 256000, logit_scale=0.0625)),
    "Ministral-3-3B": (
        "ministral3",
        _llama(
            *(3072, 9216, 26, (32, 8), 131072),
            head_dim=128,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        ),
    ),
    "OLMo-1B": ("olmo", _llama(2048, 8192, 16, (16, 16), 50304, tie_word_embeddings=True)),
    "OLMo-7B-0424": ("olmo", _llama(4096, 11008, 32, (32, 32), 50304, clip_qkv=8.0)),
    "Nemotron-Mini-4B": ("nemotron", _llama(3072, 9216, 32, (24, 8), 256000, head_dim=128)),
    "HY-MT1.5-1.8B": (
        "hunyuan_v1_dense",
        _llama(
            *(2048, 6144, 32, (16, 4), 120818),
            head_dim=128,
            rope_scaling={"type": "dynamic", "alpha": 1000.0, "factor": 1.0},
            tie_word_embeddings=True,
        ),
    ),
    "bitnet-b1.58-2B-4T": (
        "bitnet",
        _llama(2560, 6912, 30, (20, 5), 128256, rope_theta=500000.0, tie_word_embeddings=True),
    ),
    "EXAONE-4.0-1.2B": (
        "exaone4",
        _llama(
            *(2048, 4096, 30, (32, 8), 102400),
            sliding_window=None,
            layer_types=["full_attention"] * 30,
            rope_theta=1e6,
            rope_scaling={**_LLAMA3, "factor": 16.0, "original_max_position_embeddings": 8192},
        ),
    ),
    "GLM-4-9B-0414": ("glm4", _llama(4096, 13696, 40, (32, 2), 151552, attention_bias=True)),
    "glm-4-9b-chat": ("glm", _llama(4096, 13696, 40, (32, 2), 151552, attention_bias=True)),
    "ERNIE-4.5-0.3B": (
        "ernie4_5",
        _llama(1024, 3072, 18, (16, 2), 103424, head_dim=128, rope_theta=500000.0),
    ),
    "Seed-OSS-36B": ("seed_oss", _llama(5120, 27648, 8, (80, 8), 155136, head_dim=128, rope_theta=1e7)),
    "AFM-4.5B": ("arcee", _llama(2560, 18432, 36, (20, 4), 128004)),
    "Apertus-8B": ("apertus", _llama(4096, 21504, 32, (32, 8), 131072)),
    "pythia-160m": (
        "gpt_neox",
        {
            **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
            **{"num_attention_heads": 12, "vocab_size": 50304, "max_position_embeddings": 2048},
            **{"rotary_pct": 0.25, "use_parallel_residual": True, "hidden_act": "gelu"},
        },
    ),
    "stablelm-2-1_6b": (
        "stablelm",
        _llama(
            *(2048, 5632, 24, (32, 32), 100352),
            **{"partial_rotary_factor": 0.25, "use_qkv_bias": True, "layer_norm_eps": 1e-5},
        ),
    ),
    "gpt-j-6b": (
        "gptj",
        {"n_embd": 4096, "n_layer": 28, "n_head": 16, "rotary_dim": 64, "vocab_size": 50400},
    ),
    "codegen-350M-mono": (
        "codegen",
        {"n_embd": 1024, "n_layer": 20, "n_head": 16, "rotary_dim": 32, "vocab_size": 51200},
    ),
    "falcon-7b": (
        "falcon",
        {
            **{"hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "vocab_size": 65024},
            **{"multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False},
        },
    ),
    "bloom-560m": ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 250880}),
    "mpt-7b": ("mpt", {"d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432}),
    "Qwen1.5-MoE-A2.7B, two layers": (
        "qwen2_moe",
        _llama(
            *(2048, 5632, 2, (16, 16), 151936),
            **{"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
            **{"shared_expert_intermediate_size": 5632, "norm_topk_prob": False},
        ),
    ),
    "OLMoE-1B-7B, two layers": (
        "olmoe",
        _llama(2048, 1024, 2, (16, 16), 50304, num_experts=64, num_experts_per_tok=8),
    ),
    "Mixtral-8x7B, two layers": ("mixtral", _llama(4096, 14336, 2, (32, 8), 32000, sliding_window=None)),
    "all-MiniLM-L6-v2": (
        "bert",
        {
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "vocab_size": 30522,
        },
    ),
}
# The same, and a word of the message.
REFUSED: Mapping[str, tuple[str, Fields, str]] = {
    "opt-350m": (
        "opt",
        {
            "hidden_size": 1024,
            "word_embed_proj_dim": 512,
            "num_attention_heads": 16,
            "do_layer_norm_before": False,
        },
        "do_layer_norm_before",
    ),
    "granite-4.0-h-micro": (
        "granitemoehybrid",
        _llama(
            *(2048, 8192, 4, (32, 8), 100352),
            shared_intermediate_size=8192,
            num_local_experts=0,
            layer_types=["mamba", "mamba", "mamba", "attention"],
        ),
        "layer_types",
    ),
    "falcon-rw-1b": (
        "falcon",
        {
            **{"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "vocab_size": 50304},
            **{"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True},
        },
        "alibi",
    ),
    "gpt-oss-20b": ("gpt_oss", {}, "gpt_oss"),
    "DeepSeek-V3": ("deepseek_v3", {}, "deepseek_v3"),
    "Mamba-2": ("mamba2", {}, "mamba2"),
}

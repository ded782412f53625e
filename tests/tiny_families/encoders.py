"""Encoders and embedding models as the tests know them."""

from __future__ import annotations

from tiny_families.entry import Fields, TinyFamily

# Encoders have no key heads of their own, and no cache.
_SPELLED: dict[str, str | None] = {"num_key_value_heads": None}
_ROBERTA: Fields = {"pad_token_id": 1, "bos_token_id": 0, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
_WINDOWS = ["full_attention", "sliding_attention", "full_attention"]

FAMILIES = (
    TinyFamily(
        "bert",
        fields={"type_vocab_size": 2},
        spelled=_SPELLED,
        variants={"one_type": {"type_vocab_size": 1}, "relu": {"hidden_act": "relu"}},
        known=("BERT", "all-MiniLM-L6-v2", "BGE", "E5", "GTE 1", "mxbai-embed-large"),
        is_encoder=True,
        in_sample=True,
    ),
    TinyFamily(
        "roberta",
        fields=_ROBERTA,
        spelled=_SPELLED,
        variants={"two_types": {"type_vocab_size": 2}},
        known=("RoBERTa", "all-distilroberta-v1"),
        is_encoder=True,
    ),
    TinyFamily(
        "xlm-roberta",
        fields=_ROBERTA,
        spelled=_SPELLED,
        known=("multilingual-E5", "BGE-M3", "BGE rerankers"),
        is_encoder=True,
    ),
    TinyFamily("camembert", fields=_ROBERTA, spelled=_SPELLED, known=("CamemBERT",), is_encoder=True),
    TinyFamily(
        "distilbert",
        spelled={
            **_SPELLED,
            "hidden_size": "dim",
            "intermediate_size": "hidden_dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
        },
        known=("DistilBERT", "multi-qa-distilbert"),
        is_encoder=True,
    ),
    TinyFamily(
        "electra",
        fields={"embedding_size": 32},
        spelled=_SPELLED,
        variants={"wide": {"embedding_size": 64}},
        known=("ELECTRA", "MS MARCO ELECTRA cross-encoder"),
        is_encoder=True,
    ),
    TinyFamily(
        "mpnet",
        fields={"pad_token_id": 1, "bos_token_id": 0},
        spelled=_SPELLED,
        known=("all-mpnet-base-v2",),
        is_encoder=True,
    ),
    TinyFamily(
        "modernbert",
        fields={
            "local_attention": 10,
            "num_hidden_layers": 3,
            "layer_types": _WINDOWS,
            "cls_token_id": 1,
            "sep_token_id": 2,
        },
        spelled=_SPELLED,
        variants={"biases": {"norm_bias": True, "attention_bias": True, "mlp_bias": True}},
        known=("ModernBERT", "gte-modernbert-base", "modernbert-embed"),
        is_encoder=True,
    ),
    TinyFamily("nomic_bert", spelled=_SPELLED, known=("nomic-embed-text-v1.5",), is_encoder=True),
    TinyFamily(
        "gte", fields={"type_vocab_size": 1}, spelled=_SPELLED, known=("gte-base-en-v1.5",), is_encoder=True
    ),
    TinyFamily(
        "jina_embeddings_v3",
        fields=_ROBERTA,
        spelled=_SPELLED,
        known=("jina-embeddings-v3",),
        is_encoder=True,
    ),
    TinyFamily(
        "eurobert",
        fields={"head_dim": 32, "mask_token_id": 3},
        variants={"biases": {"attention_bias": True, "mlp_bias": True}},
        known=("EuroBERT",),
        is_encoder=True,
    ),
    TinyFamily(
        "embeddinggemma",
        model_type="gemma3_text",
        fields={
            "head_dim": 32,
            "query_pre_attn_scalar": 24,
            "sliding_window": 10,
            "num_hidden_layers": 3,
            "layer_types": _WINDOWS,
            "use_bidirectional_attention": True,
            "rms_norm_eps": 1e-3,
        },
        known=("EmbeddingGemma",),
        is_encoder=True,
    ),
    TinyFamily(
        "qwen3_embedding",
        model_type="qwen3",
        fields={"head_dim": 32, "gives_hidden_states": True, "tie_word_embeddings": True},
        variants={
            "window": {
                "use_sliding_window": True,
                "sliding_window": 6,
                "max_window_layers": 1,
            }
        },
        known=("Qwen3-Embedding",),
        is_encoder=True,
    ),
)

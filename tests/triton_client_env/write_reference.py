"""Writes tiny bundles and what the runtime itself answers; run by the environment of rk-export.

python tests/triton_client_env/write_reference.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers of the other tests

from runtime_models import write_encoder
from serving import write_decoder

from rk_export.runtime import EncoderSession, GenerationOptions, Session

IDS = [[72, 97, 114, 98, 111, 117, 114], [83, 104, 105, 112, 115, 33, 33]]
PROMPTS = ["The harbour", "Ships, and a café"]
TOKENS = 12


def main(folder: Path) -> None:
    """Write the bundles and the reference."""
    session = Session.from_pretrained(write_decoder(folder / "tiny"), provider="cpu", threads=1)
    encoder = EncoderSession.from_pretrained(write_encoder(folder / "enc"), provider="cpu", threads=1)
    options = GenerationOptions(max_new_tokens=TOKENS)
    texts = [session.generate([prompt], options=options)[0].text for prompt in PROMPTS]
    np.savez(
        folder / "reference.npz",
        ids=np.array(IDS),
        logits=session.prefill_logits(np.array(IDS)),
        vectors=encoder.embed(["harbour"]),
    )
    facts = {"prompts": PROMPTS, "texts": texts, "tokens": TOKENS}
    (folder / "reference.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""What one compression reads and builds: every tensor twice, files once, the config and the model's shapes once."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_counts import counts_of_one_compress, runs
from tiny_models import tiny_model

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("run", runs())
def test_a_compression_reads_every_tensor_twice_and_describes_the_model_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str
) -> None:
    monkeypatch.setattr("rk_export.tensor_cache.CACHE", tmp_path / "cache")
    tiny_model("llama", bos_token_id=1).save_pretrained(tmp_path / "model")
    first, second = (counts_of_one_compress(tmp_path / "model", runs()[run]) for _ in range(2))
    for counts in (first, second):
        assert counts["most reads of one tensor"] <= 2
        assert counts["tensor reads"] <= 2 * counts["tensors"]
        assert counts["file opens"] <= 4  # twice for the types in the headers alone
        assert counts["describe"] == 1
        assert counts["architecture_of"] <= 7
        assert counts["decoder_spec"] <= 4
        assert counts["models on meta"] <= 4
    assert first["files hashed"] == 1
    assert second["files hashed"] == 0  # the index knows them
    # What the first run left in the cache spares the second the whole model; pruning is measured against it.
    assert first["whole models kept"] > 0
    assert second["whole models kept"] == (1 if "pruned" in run else 0)

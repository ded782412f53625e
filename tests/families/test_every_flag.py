"""No vacuous test: each flag of a family's spec, set back to that of a plain Llama, breaks parity or the structure.

A flag is a value in `DecoderSpec`, `LayerSpec` or what they hold that differs from a Llama of the same sizes. A graph
is built with the same weights and one flag set back. Where it still computes what transformers computes, the tiny model
does not show the flag, and no test of parity says anything about it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from compressed import OnnxModel, compress, floats
from exactness import BOUND, hole_error, prefill_error, untouched
from family_runs import families, record, sampled
from spec_flags import Flag, flags
from tiny_models import family_of, tiny_config, tiny_model
from transformers import PreTrainedModel

from rk_export.errors import RkExportError
from rk_export.model.description import describe
from rk_export.source.stored import StoredModel, open_source

pytestmark = pytest.mark.whole

BROKEN = 100 * BOUND


def found_without(flag: Flag, source: StoredModel, model: PreTrainedModel, folder: Path) -> float | str:
    """Return how far the graph without a flag is from transformers, or what says that it is another model's.

    A description keeps its spec once it is read, so it is replaced there: the config stays as it is.
    """
    kept = source.description.decoder
    vars(source.description)["decoder"] = flag.without(kept)
    try:
        graph = OnnxModel(compress(source, floats()), folder)
        return max(prefill_error(graph, model), hole_error(graph, model))
    except RkExportError as error:
        return error.what
    except AttributeError as error:  # a family without rotation has no module that says how to rotate
        if "has no attribute" not in str(error) or flag.place not in ("learned_positions", "layers.rotary"):
            raise
        return str(error)
    finally:
        vars(source.description)["decoder"] = kept


@pytest.mark.parametrize("name", sampled([name for name in families() if not family_of(name).is_encoder], 10))
def test_each_flag_is_seen(name: str, tmp_path: Path) -> None:
    tiny_model(name).save_pretrained(tmp_path)
    source, model = open_source(tmp_path), untouched(name, tmp_path)
    found = {
        flag.place: found_without(flag, source, model, tmp_path) for flag in flags(source.description.decoder)
    }
    unseen = {place: error for place, error in found.items() if isinstance(error, float) and error < BROKEN}
    assert not unseen, f"parity holds without them: {unseen}"
    record(name, "flags", found)


def test_flags_are_found() -> None:
    places = {flag.place for flag in flags(describe(tiny_config("gemma2")).decoder)}
    assert {"attention_softcap", "logit_softcap", "embedding_scale", "norm_names", "layers.window"} <= places
    assert "experts.routing.normalized" in {
        flag.place for flag in flags(describe(tiny_config("qwen3_moe")).decoder)
    }
    assert not flags(describe(tiny_config("llama")).decoder)


def test_a_flag_that_is_not_shown_is_found(tmp_path: Path) -> None:
    """A window wider than every text of these tests."""
    tiny_model("mistral", sliding_window=100).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    flag = next(flag for flag in flags(source.description.decoder) if flag.place == "layers.window")
    error = found_without(flag, source, untouched("mistral", tmp_path), tmp_path)
    assert isinstance(error, float)
    assert error < BOUND

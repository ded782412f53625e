"""The fields of published config.json files, in their own spelling and with all that they state, on tiny models.

Names, options and leftovers of other tools are those of the files; widths, layers and windows are small.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed import OnnxModel, compress, floats
from config_walk import ROUNDING
from exactness import BOUND, prefill_error, rounding, steps_error, words
from family_runs import sampled
from tiny_models import transformers_own
from transformers import AutoConfig, AutoModelForCausalLM

from rk_export.source.stored import open_source

pytestmark = pytest.mark.whole

PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    Path(__file__).with_name("published_configs.json").read_text("utf-8")
)
LENGTH = 40


def saved(stated: dict[str, Any], folder: Path) -> None:
    """Save a random model whose config.json says what was published."""
    (folder / "config.json").write_text(json.dumps(stated), "utf-8")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
            parameter.copy_(centre + 0.25 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(stated), "utf-8")


@pytest.mark.parametrize("name", sampled(PUBLISHED, 12))
def test_a_published_config_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    saved(PUBLISHED[name], tmp_path)
    model = transformers_own(tmp_path)
    graph = OnnxModel(compress(open_source(tmp_path), floats()), tmp_path)
    error = max(prefill_error(graph, model, LENGTH), steps_error(graph, model, LENGTH))
    if error > BOUND:  # rounding disturbs some of these models more; not all are computed in float64
        assert error <= ROUNDING * rounding(model, words(2, LENGTH))

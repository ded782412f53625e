"""Configs of published checkpoints, without weights: taken, or refused by name before anything is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from family_runs import EVERYTHING, sampled
from real_configs import REFUSED, TAKEN
from transformers import AutoConfig

from rk_export.errors import UnsupportedModelError
from rk_export.graph.dense.frontend import check_supported
from rk_export.model.description import ModelDescription, describe
from rk_export.source.stored import read_config

LAYERS = 8  # as many are built of each in a normal run: they come in patterns of up to six


def described(folder: Path, model_type: str, fields: Mapping[str, Any]) -> ModelDescription:
    config = AutoConfig.for_model(model_type, **fields)
    stated = {**config.to_diff_dict(), "model_type": model_type, **fields}
    (folder / "config.json").write_text(json.dumps(stated), "utf-8")
    return describe(read_config(folder))


@pytest.mark.parametrize("name", sampled(TAKEN, 3))
def test_a_published_config_is_taken(name: str, tmp_path: Path) -> None:
    model_type, fields = TAKEN[name]
    if not EVERYTHING and fields.get("num_hidden_layers", 0) > LAYERS:
        fields = {key: value[:LAYERS] if key == "layer_types" else value for key, value in fields.items()}
        fields = {**fields, "num_hidden_layers": LAYERS}
    description = described(tmp_path, model_type, fields)
    for ep, dtype in (("cpu", "fp32"), ("portable", "fp16")):
        check_supported(description, ep=ep, dtype=dtype)


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_config_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model_type, fields, word = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=word):
        check_supported(described(tmp_path, model_type, fields), ep="cpu", dtype="fp32")

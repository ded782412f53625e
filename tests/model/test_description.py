"""A description says of every matrix what the model, the plan and the graph say of it."""

from __future__ import annotations

import pytest
from tiny_models import FAMILIES, tiny_config
from torch import nn

from rk_export.model.description import describe
from rk_export.model.exported_names import rename_tensors
from rk_export.model.sites import plain_sites


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_has_its_names_and_its_shape(family: str) -> None:
    description = describe(tiny_config(family))
    model, architecture = description.canonical_model(), description.architecture
    sites = [
        (site.site, matrix)
        for layer in description.layers()
        for site in plain_sites(layer, description.projections(layer.index))
        for matrix in site.matrices
    ]
    assert sorted((matrix.site, matrix.id) for matrix in description.matrices) == sorted(sites)
    for matrix in description.matrices:
        module = model.get_submodule(matrix.torch_path)
        assert isinstance(module, nn.Linear)
        assert (module.out_features, module.in_features) == matrix.shape
        name = f"{matrix.torch_path}.weight"
        assert list(rename_tensors(architecture, {name: module.weight}, tied=False)) == [
            f"{matrix.onnx_path}.weight"
        ]
        assert matrix.torch_path.endswith(matrix.id.name.removeprefix("layers"))


def test_what_is_handed_out_is_the_callers_own() -> None:
    description = describe(tiny_config("phi3"))
    description.layer(0).self_attn.qkv_proj = None  # type: ignore[assignment]
    assert description.layer(0).self_attn.qkv_proj is not None
    assert description.skeleton() is not description.skeleton()
    assert description.matrices is description.matrices

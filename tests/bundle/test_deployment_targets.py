"""Deployment targets on a graph made by hand: what they write, and what they refuse."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from deployable import write_graph

from rk_export.bundle.targets import TARGETS
from rk_export.bundle.targets.base import Deployment
from rk_export.bundle.targets.kserve_triton import write_manifest
from rk_export.bundle.targets.triton import write_repository
from rk_export.errors import InputError


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder beside the bundle, on the same file system."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What passes for a bundle."""
    made = tmp_path / "folder"
    made.mkdir()
    return made


def manifest(deployment: Deployment, place: Path) -> Any:
    write_manifest(deployment, place)
    return yaml.safe_load((place / "inferenceservice.yaml").read_text(encoding="utf-8"))


def test_targets_have_names_of_their_own_and_need_listed_ones() -> None:
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names)
    assert {needed for target in TARGETS for needed in target.needs} <= set(names)


def test_triton_repository_shares_the_files_and_describes_the_tensors(folder: Path, place: Path) -> None:
    write_graph(folder, "FLOAT16")
    write_repository(Deployment(folder, "tiny", "cuda"), place)

    model = place / "tiny" / "1" / "model.onnx"
    assert sorted(p.name for p in model.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (model / "model.onnx.data").samefile(folder / "model.onnx.data")
    text = (place / "tiny" / "config.pbtxt").read_text()
    assert 'backend: "onnxruntime"' in text
    assert "max_batch_size: 8" in text
    assert 'input [ { name: "input_ids", data_type: TYPE_INT64, dims: [ -1 ] } ]' in text
    assert 'output [ { name: "present.0.key", data_type: TYPE_FP16, dims: [ 2, -1, 16 ] } ]' in text
    assert "KIND_GPU" in text
    assert 'name: "cuda"' in text
    assert text.count("{") == text.count("}")


def test_triton_follows_files_that_are_links(folder: Path, place: Path, tmp_path: Path) -> None:
    """A bundle in the Hub's cache is links to files of other names; a link to a link breaks when it is moved."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    write_graph(folder)
    for number, name in enumerate(("model.onnx", "model.onnx.data")):
        (folder / name).rename(blobs / str(number))
        (folder / name).symlink_to(Path("..") / "blobs" / str(number))
    write_repository(Deployment(folder, "tiny"), place)
    for name in ("model.onnx", "model.onnx.data"):
        assert not (place / "tiny" / "1" / "model.onnx" / name).is_symlink()


def test_triton_on_cpu_names_no_accelerator_and_copies_without_hard_links(
    folder: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    write_graph(folder)
    monkeypatch.setattr(os, "link", refuse)
    write_repository(Deployment(folder, "tiny"), place)
    copy = place / "tiny" / "1" / "model.onnx" / "model.onnx.data"
    assert copy.read_bytes() == (folder / "model.onnx.data").read_bytes()
    assert "accelerator" not in (place / "tiny" / "config.pbtxt").read_text()


def test_triton_refuses_what_it_cannot_describe(folder: Path, place: Path) -> None:
    with pytest.raises(InputError, match=r"model\.onnx is missing"):
        write_repository(Deployment(folder, "tiny"), place)
    write_graph(folder, "UINT16")
    with pytest.raises(InputError, match=r"past_key_values\.0\.key has type UINT16"):
        write_repository(Deployment(folder, "tiny"), place)
    assert not list(place.iterdir())


def test_kserve_triton_names_the_runtime_an_image_and_the_repository(folder: Path, place: Path) -> None:
    found = manifest(Deployment(folder, "Tiny_Llama.v2"), place)
    assert (found["apiVersion"], found["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert found["metadata"] == {"name": "tiny-llama-v2"}
    model = found["spec"]["predictor"]["model"]
    assert model["modelFormat"] == {"name": "triton", "version": "2"}
    assert (model["runtime"], model["protocolVersion"]) == ("kserve-tritonserver", "v2")
    assert model["runtimeVersion"] == "26.08-py3"
    assert model["storageUri"] == "pvc://models/tiny-llama-v2/triton"
    assert model["resources"]["limits"] == {"memory": "2Gi"}
    assert "/v2/models/Tiny_Llama.v2/infer" in (place / "inferenceservice.yaml").read_text()


def test_kserve_triton_takes_the_bundles_place_and_asks_for_a_gpu_where_it_is_for_one(
    folder: Path, place: Path
) -> None:
    with (folder / "model.onnx.data").open("wb") as file:
        file.truncate(3 * 2**29)  # takes no space on the disk
    found = manifest(Deployment(folder, "m", "cuda", "s3://models/m/"), place)
    model = found["spec"]["predictor"]["model"]
    assert model["storageUri"] == "s3://models/m/triton"
    assert model["resources"]["limits"] == {"memory": "5Gi", "nvidia.com/gpu": "1"}

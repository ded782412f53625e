"""`deployment_files`: a finished bundle gets more files, and its manifest still proves every one of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deployable import write_deployable

from rk_export import InputError, Run, deployment_files, verify
from rk_export.bundle.targets import TARGETS
from rk_export.manifest import check_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_deployable(tmp_path / "tiny")


def listed(folder: Path) -> set[str]:
    return set(check_manifest(folder)["files"])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.parent.rglob("*")) if path.is_file()}


def test_the_manifest_lists_what_was_added(folder: Path) -> None:
    before = check_manifest(folder)
    assert deployment_files(folder, ["triton"]) == (folder / "triton",)
    after = check_manifest(folder)
    assert after["files"].keys() - before["files"].keys() == {
        "triton/tiny/config.pbtxt",
        *("triton/tiny/1/model.onnx/model.onnx", "triton/tiny/1/model.onnx/model.onnx.data"),
    }
    assert {**after, "files": 0} == {**before, "files": 0}
    assert [path.name for path in folder.parent.iterdir()] == ["tiny"]


def test_a_target_brings_along_what_it_refers_to(folder: Path) -> None:
    places = deployment_files(folder, ["kserve-triton"], name="m")
    assert [place.name for place in places] == ["triton", "kserve-triton"]
    assert "kserve-triton/inferenceservice.yaml" in listed(folder)
    assert (folder / "triton" / "m" / "config.pbtxt").is_file()


def test_what_is_there_already_serves_a_target_that_refers_to_it(folder: Path) -> None:
    deployment_files(folder, ["triton"])
    config = folder / "triton" / "tiny" / "config.pbtxt"
    config.touch()
    made = config.stat().st_ino
    assert [place.name for place in deployment_files(folder, ["kserve-triton"])] == ["kserve-triton"]
    assert config.stat().st_ino == made


def test_files_are_replaced_with_force_only(folder: Path) -> None:
    deployment_files(folder, ["triton"])
    before = everything(folder)
    with pytest.raises(InputError, match=r"triton: exists already\nFix: add --force"):
        deployment_files(folder, ["triton"], name="other")
    assert everything(folder) == before
    deployment_files(folder, ["triton"], name="other", force=True)
    assert {name.split("/")[1] for name in listed(folder) if name.startswith("triton/")} == {"other"}


@pytest.mark.parametrize(
    ("targets", "options", "message"),
    [
        ([], {}, "--for: no target is named"),
        (
            ["triton", "seldon"],
            {},
            "--for: 'seldon' is no deployment target\nFix: give some of triton, triton-python, kserve, kserve-triton",
        ),
        (["triton"], {"name": "../../elsewhere"}, "--name: '../../elsewhere' cannot name a served model"),
        (
            ["triton"],
            {"storage": "pvc://m/t"},
            "--storage: goes with kserve, kserve-triton, kubernetes\nFix: add",
        ),
        (["kserve-triton"], {"image": "a/b"}, "--image: goes with kserve, kubernetes\nFix: add"),
        (["triton", "kserve"], {"name": "7b"}, "--name: '7b' makes no name of a service"),
        (
            ["triton", "kubernetes"],
            {"storage": "s3://m/t"},
            "--storage: 's3://m/t' is no persistent volume claim",
        ),
    ],
)
def test_refusals_leave_everything_as_it_was(
    folder: Path, targets: list[str], options: dict[str, str], message: str
) -> None:
    before = everything(folder)
    with pytest.raises(InputError) as refusal:
        deployment_files(folder, targets, **options)  # type: ignore[arg-type]
    assert str(refusal.value).startswith(message)
    assert everything(folder) == before


def test_a_changed_bundle_is_not_given_new_checksums(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(bytes(1023) + b"1")
    before = everything(folder)
    with pytest.raises(InputError, match="its checksum differs from the manifest"):
        deployment_files(folder, ["triton"])
    assert everything(folder) == before


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no bundle here: rk_manifest\.json is missing"):
        deployment_files(tmp_path, ["triton"])


def test_a_graphics_card_is_asked_for_where_the_bundle_is_for_one(tmp_path: Path) -> None:
    folder = write_deployable(tmp_path / "tiny", ep="cuda")
    names = ["kserve", "kserve-triton", "kubernetes"]
    deployment_files(folder, names)
    assert "KIND_GPU" in (folder / "triton" / "tiny" / "config.pbtxt").read_text()
    for name, file in zip(names, ["inferenceservice", "inferenceservice", "deployment"], strict=True):
        assert "nvidia.com/gpu" in (folder / name / f"{file}.yaml").read_text()


@pytest.mark.whole
def test_a_real_bundle_verifies_after_it(own_bundle: Path) -> None:
    deployment_files(own_bundle, [target.name for target in TARGETS], name="tiny")
    assert all(tier.passed is not False for tier in verify(own_bundle, run=Run(threads=1)))
    stored = json.loads((own_bundle / "rk_manifest.json").read_text(encoding="utf-8"))["files"]
    assert stored["model.onnx"] == stored["triton/tiny/1/model.onnx/model.onnx"]

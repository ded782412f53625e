"""The model repository for Triton's Python backend; the real server reads it in `tests/triton_env`."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from encoder_bundles import write_classifier
from runtime_models import TinyDecoder, write_encoder

from rk_export import deployment_files
from rk_export.errors import InputError
from rk_export.manifest import check_manifest, write_manifest
from rk_export.runtime import Session
from rk_export.runtime.triton.model import TritonModel


def made(folder: Path, ep: str = "cpu") -> Path:
    TinyDecoder(external=True).write(folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    write_manifest(folder, {"ep": ep, "shared_kv_cache": True})
    return folder


def test_the_bundle_lies_below_the_version_as_links(tmp_path: Path) -> None:
    folder = made(tmp_path / "tiny")
    own = set(check_manifest(folder)["files"])
    deployment_files(folder, ["triton"])
    (repository,) = deployment_files(folder, ["triton-python"], name="m")
    inner = repository / "m" / "1" / "bundle"
    assert repository == folder / "triton-python"
    assert set(check_manifest(inner)["files"]) == own
    assert all((inner / name).samefile(folder / name) for name in own)
    check_manifest(folder)
    again = Session.from_pretrained(inner, provider="cpu", threads=1, check=True)
    assert again.generate("a") == Session.from_pretrained(folder, provider="cpu", threads=1).generate("a")


def test_the_model_file_only_hands_over_the_backends_module(tmp_path: Path) -> None:
    (repository,) = deployment_files(made(tmp_path / "tiny"), ["triton-python"])
    tree = ast.parse((repository / "tiny" / "1" / "model.py").read_text(encoding="utf-8"))
    (kind,) = (node for node in tree.body if isinstance(node, ast.ClassDef))
    assert (kind.name, ast.unparse(kind.bases[0])) == ("TritonPythonModel", TritonModel.__name__)
    assert f"from {TritonModel.__module__} import TritonModel" in ast.unparse(tree)


@pytest.mark.parametrize("ep", ["cpu", "cuda"])
def test_the_configuration_names_the_provider(ep: str, tmp_path: Path) -> None:
    (repository,) = deployment_files(made(tmp_path / "tiny", ep), ["triton-python"])
    text = (repository / "tiny" / "config.pbtxt").read_text(encoding="utf-8")
    assert f'key: "provider" value {{ string_value: "{ep}" }}' in text


def test_what_writes_no_text_is_refused(tmp_path: Path) -> None:
    encoder = write_encoder(tmp_path / "encoder")
    write_manifest(encoder, {"ep": "cpu"})
    classifier = write_classifier(tmp_path / "classifier")
    write_manifest(classifier, {"ep": "cpu"})
    mute = TinyDecoder().write(tmp_path / "mute", tokenizer=False)
    write_manifest(mute, {"ep": "cpu"})
    told = "an encoder writes no text"
    for folder, message in ((encoder, told), (classifier, told), (mute, r"tokenizer\.json is missing")):
        with pytest.raises(InputError, match=message):
            deployment_files(folder, ["triton-python"])
        assert not (folder / "triton-python").exists()

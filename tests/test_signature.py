"""Signatures of bundles: what they cover, and the message of everything that is wrong with them."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cli
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from signing_keys import write_keys

from rk_export.errors import InputError
from rk_export.manifest import MANIFEST, SIGNATURE, check_manifest, replace_in_manifest, write_manifest
from rk_export.signature import check_signature, sign_bundle


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    return write_keys(tmp_path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    (folder / "triton").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"graph")
    (folder / "triton" / "config").write_bytes(b"x")
    write_manifest(folder, {"ep": "cpu"})
    return folder


def test_a_signed_bundle_is_accepted(folder: Path, keys: tuple[Path, Path]) -> None:
    private, public = keys
    assert sign_bundle(folder, private) == folder / SIGNATURE
    check_signature(folder, public)
    check_manifest(folder)
    (folder / ".gitattributes").write_text("of a repository")
    check_signature(folder, public)
    sign_bundle(folder, private)  # once more


Change = Callable[[Path], object]
CHANGES: dict[str, tuple[Change, str]] = {
    "no signature": (lambda folder: (folder / SIGNATURE).unlink(), "not signed"),
    "a cut signature": (lambda folder: (folder / SIGNATURE).write_bytes(b"x" * 63), "no signature"),
    "another signature": (lambda folder: (folder / SIGNATURE).write_bytes(b"x" * 64), "is not that of"),
    "a link": (lambda folder: _linked(folder / SIGNATURE), "leads out of the folder"),
    "a manifest of the same content": (lambda folder: _rewritten(folder), "is not that of"),
    "a file more": (lambda folder: (folder / "added_tokens.json").write_text("{}"), "is not in the manifest"),
    "a manifest anew": (lambda folder: write_manifest(folder, {"ep": "cuda"}), "is not that of"),
}


def _linked(path: Path) -> None:
    away = path.parent.parent / "away"
    path.rename(away)
    path.symlink_to(away)


def _rewritten(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused(folder: Path, keys: tuple[Path, Path], name: str) -> None:
    change, message = CHANGES[name]
    sign_bundle(folder, keys[0])
    change(folder)
    with pytest.raises(InputError, match=message):
        check_signature(folder, keys[1])


def test_a_changed_file_is_found_by_the_manifest(folder: Path, keys: tuple[Path, Path]) -> None:
    sign_bundle(folder, keys[0])
    (folder / "model.onnx").write_bytes(b"grapH")
    check_signature(folder, keys[1])
    with pytest.raises(InputError, match="checksum differs"):
        check_manifest(folder)
    with pytest.raises(InputError, match="checksum differs"):
        sign_bundle(folder, keys[0])


def test_another_key_is_refused(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    sign_bundle(folder, keys[0])
    _, stranger = write_keys(tmp_path, "stranger")
    with pytest.raises(InputError, match=r"not that of stranger-public\.pem"):
        check_signature(folder, stranger)


def test_what_is_no_key_is_refused(folder: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    private, public = keys
    rsa, locked, text = (tmp_path / name for name in ("rsa.pem", "locked.pem", "text.pem"))
    key = generate_private_key(65537, 2048)
    rsa.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    own = load_pem_private_key(private.read_bytes(), None)
    locked.write_bytes(own.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")))
    text.write_text("no key")
    for file, message in (
        (tmp_path / "absent", "no such key file"),
        (tmp_path, "no such key file"),
        (text, "no key in PEM form"),
        (rsa, "another kind than Ed25519"),
        (locked, "locked with a passphrase"),
        (public, "a public key"),
    ):
        with pytest.raises(InputError, match=message) as refusal:
            sign_bundle(folder, file)
        assert refusal.value.where == str(file)
        assert refusal.value.fix
    assert not (folder / SIGNATURE).exists()
    sign_bundle(folder, private)
    for file, message in (
        (tmp_path / "absent", "no such key file"),
        (private, "a private key"),
        (text, "no key"),
    ):
        with pytest.raises(InputError, match=message):
            check_signature(folder, file)


def test_a_missing_package_is_said(
    folder: Path, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(InputError, match=r"rk-export\[sign\]"):
        sign_bundle(folder, keys[0])
    with pytest.raises(InputError, match=r"rk-export\[sign\]"):
        check_signature(folder, keys[1])


def test_new_deployment_files_end_a_signature(
    folder: Path, keys: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    sign_bundle(folder, keys[0])
    with caplog.at_level(logging.WARNING):
        replace_in_manifest(folder, ["triton"])
    assert "sign it again" in caplog.text
    assert not (folder / SIGNATURE).exists()
    sign_bundle(folder, keys[0])
    check_signature(folder, keys[1])


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_openssl_makes_the_keys_and_checks_the_signature(folder: Path, tmp_path: Path) -> None:
    """The commands are those of docs/how-to/deploy.md."""

    def openssl(*words: object) -> str:
        done = subprocess.run(["openssl", *map(str, words)], capture_output=True, text=True, check=True)
        return done.stdout

    private, public = tmp_path / "KEY.pem", tmp_path / "PUBLIC.pem"
    openssl("genpkey", "-algorithm", "ed25519", "-out", private)
    openssl("pkey", "-in", private, "-pubout", "-out", public)
    signature = sign_bundle(folder, private)
    check_signature(folder, public)
    told = openssl(
        *("pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin"),
        *("-in", folder / MANIFEST, "-sigfile", signature),
    )
    assert "Verified Successfully" in told


@pytest.mark.whole
def test_verify_checks_the_signature_before_anything_else(cli: Cli, own_bundle: Path, tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    signed = cli("sign", own_bundle, "--key", private)
    assert (signed.code, signed.out) == (0, f"signature  {own_bundle / SIGNATURE}\n"), signed.err
    options = ("--key", public, "--threads", 1, "--provider", "cpu")
    assert cli("verify", own_bundle, *options).code == 0
    assert cli("verify", own_bundle, "--threads", 1, "--provider", "cpu").code == 0
    (own_bundle / "model.onnx").write_bytes(b"")  # what would be refused without a key too
    _, stranger = write_keys(tmp_path, "stranger")
    ended = cli("verify", own_bundle, "--key", stranger)
    assert (ended.code, "the signature is not that of stranger-public.pem" in ended.err) == (2, True)
    ended = cli("verify", own_bundle, *options)
    assert (ended.code, "model.onnx: corrupted" in ended.err) == (2, True)

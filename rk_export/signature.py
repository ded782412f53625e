"""A detached signature of a bundle: who has the public key knows that the bundle is what the key's owner signed.

What is signed is ``rk_manifest.json``, which holds the SHA-256 of every file. The signature is Ed25519 (RFC 8032) over
its bytes, 64 bytes in ``rk_manifest.json.sig``; openssl checks it too. The package cryptography does the arithmetic.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rk_export.atomic import atomic_file
from rk_export.errors import InputError
from rk_export.inside import file_inside
from rk_export.manifest import MANIFEST, SIGNATURE, check_manifest, files_of, read_manifest

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

_BYTES = 64
_LARGEST_KEY = 1 << 16
_MAKE = "make one: openssl genpkey -algorithm ed25519 -out KEY.pem"
_AGAIN = "get bundle and public key again from their maker, by ways that you trust"
_PUBLIC = "give the public key: openssl pkey -in KEY.pem -pubout -out PUBLIC.pem"


def sign_bundle(folder: str | os.PathLike[str], key: str | os.PathLike[str]) -> Path:
    """Check every file of a bundle, and write the signature of its manifest beside it.

    Args:
        folder: The bundle.
        key: File of an Ed25519 private key, PEM without a passphrase.

    Returns:
        The file of the signature, ``rk_manifest.json.sig``; an older one is replaced.

    Raises:
        InputError: A file of the bundle is missing, changed or not in its manifest, the key cannot be used, or the
            package cryptography is not installed.
    """
    root, private = Path(folder), _private_key(Path(key))
    check_manifest(root)
    _refuse_unlisted(root)
    with atomic_file(root / SIGNATURE) as partial:
        partial.write_bytes(private.sign((root / MANIFEST).read_bytes()))
    return root / SIGNATURE


def check_signature(folder: str | os.PathLike[str], key: str | os.PathLike[str]) -> None:
    """Check that a manifest is what a key's owner signed, and that the bundle holds no other files.

    Files whose path has a name that begins with a dot are passed over: no runtime reads them. The files that the
    manifest lists are not read here; `check_manifest` does that.

    Args:
        folder: The bundle.
        key: File of the Ed25519 public key, PEM.

    Raises:
        InputError: There is no signature, it is not of this key or not of this manifest, a file is not listed, the key
            cannot be used, or the package cryptography is not installed.
    """
    root, public = Path(folder), _public_key(Path(key))
    read_manifest(root)
    if not (root / SIGNATURE).is_file():
        raise InputError(
            f"not signed: {SIGNATURE} is missing",
            where=str(root),
            fix="sign it with `rk-export sign`, or get the signature from whoever made the bundle",
        )
    for name in (MANIFEST, SIGNATURE):
        file_inside(root, name, where=str(root))
    if (root / SIGNATURE).stat().st_size != _BYTES:
        raise InputError(f"no signature: it has not {_BYTES} bytes", where=str(root / SIGNATURE), fix=_AGAIN)
    from cryptography.exceptions import InvalidSignature

    try:
        public.verify((root / SIGNATURE).read_bytes(), (root / MANIFEST).read_bytes())
    except InvalidSignature as error:
        raise InputError(
            f"the signature is not that of {Path(key).name} over this manifest: the bundle was changed, or another key "
            "signed it",
            where=str(root / SIGNATURE),
            fix=_AGAIN,
        ) from error
    _refuse_unlisted(root)


def _refuse_unlisted(root: Path) -> None:
    listed = read_manifest(root)["files"]
    for name in files_of(root):
        if name not in listed and not any(part.startswith(".") for part in name.split("/")):
            raise InputError(
                f"{name} is not in the manifest, so no signature covers it",
                where=str(root),
                fix="remove the file, or export the bundle again",
            )


def _private_key(path: Path) -> Ed25519PrivateKey:
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _key_text(path, _MAKE)
    if b"PUBLIC KEY-----" in data:
        raise InputError("a public key: it cannot sign", where=str(path), fix="give the private key")
    key = _loaded(lambda: load_pem_private_key(data, password=None), path, _MAKE)
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError("a key of another kind than Ed25519", where=str(path), fix=_MAKE)
    return key


def _public_key(path: Path) -> Ed25519PublicKey:
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _key_text(path, _PUBLIC)
    if b"PRIVATE KEY-----" in data:
        raise InputError("a private key: it must not leave its owner", where=str(path), fix=_PUBLIC)
    key = _loaded(lambda: load_pem_public_key(data), path, _PUBLIC)
    if not isinstance(key, Ed25519PublicKey):
        raise InputError("a key of another kind than Ed25519", where=str(path), fix=_PUBLIC)
    return key


def _loaded(load: Callable[[], Any], path: Path, fix: str) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load()
    except TypeError as error:  # the library's way to say that it needs a passphrase
        raise InputError(
            "the key is locked with a passphrase",
            where=str(path),
            fix="unlock it first: openssl pkey -in KEY.pem -out UNLOCKED.pem",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError("no key in PEM form", where=str(path), fix=fix) from error


def _key_text(path: Path, fix: str) -> bytes:
    if not path.is_file():
        raise InputError("no such key file", where=str(path), fix=fix)
    try:
        with path.open("rb") as handle:
            return handle.read(_LARGEST_KEY)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from error


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise InputError(
            "signatures need the package cryptography, which is not installed",
            where="--key",
            fix="pip install 'rk-export[sign]'",
        ) from error

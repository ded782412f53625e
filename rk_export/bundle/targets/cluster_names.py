"""What a deployment is called in a cluster: the object's name, the place of its files, the image."""

from __future__ import annotations

import re

from rk_export.bundle.targets.base import Deployment
from rk_export.errors import InputError
from rk_export.manifest import library_versions

_LABEL_LENGTH = 63  # of a DNS label, which the names of services are
_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"'#]+")
_CLAIM = re.compile(r"pvc://([a-z0-9](?:[-.a-z0-9]*[a-z0-9])?)((?:/[\w.-]+)*)/?")
_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[\w.-]+(?::\d+)?/)?{_PART}(?:/{_PART})*(?::\w[\w.-]{{0,127}})?(?:@sha256:[0-9a-f]{{64}})?"
)


def service_name(name: str, *, suffix: str = "") -> str:
    """Return the model's name as a DNS label.

    Args:
        name: Name of the served model.
        suffix: What the cluster appends to it for objects of its own.

    Raises:
        InputError: No label can be made of it.
    """
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    longest = _LABEL_LENGTH - len(suffix)
    if not _LABEL.fullmatch(label) or len(label) > longest:
        raise InputError(
            f"{name!r} makes no name of a service: it must begin with a letter and have {longest} characters at most",
            where="--name",
            fix="give another name",
        )
    return label


def storage_uri(deployment: Deployment, service: str) -> str:
    """Return the place of the bundle as a URI; without another wish a folder of the claim ``models``.

    Raises:
        InputError: It is none.
    """
    storage = (deployment.storage or _default(service)).rstrip("/")
    if not _URI.fullmatch(storage):
        raise InputError(
            f"{storage!r} is no place that KServe can read",
            where="--storage",
            fix="give a URI such as pvc://CLAIM/PATH or s3://BUCKET/PATH",
        )
    return storage


def volume_claim(deployment: Deployment, service: str) -> tuple[str, str]:
    """Return the persistent volume claim that holds the bundle, and the path in it; ``""`` is all of it.

    Raises:
        InputError: The place is another one than a claim.
    """
    storage = deployment.storage or _default(service)
    found = _CLAIM.fullmatch(storage)
    if found is None or ".." in found[2].split("/"):
        raise InputError(
            f"{storage!r} is no persistent volume claim",
            where="--storage",
            fix="give pvc://CLAIM/PATH; other places need an init container of your own",
        )
    return found[1], found[2].strip("/")


def _default(service: str) -> str:
    return f"pvc://models/{service}"


def image_of(deployment: Deployment) -> str:
    """Return the image that runs ``rk-export serve``; without another wish the one of this version.

    Raises:
        InputError: It is no reference to an image.
    """
    if deployment.image is None:
        version = library_versions().get("rk-export", "latest")
        return f"rk-export:{version}{'-cuda' if deployment.ep == 'cuda' else ''}"
    if not _IMAGE.fullmatch(deployment.image):
        raise InputError(
            f"{deployment.image!r} is no container image",
            where="--image",
            fix="give REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST",
        )
    return deployment.image

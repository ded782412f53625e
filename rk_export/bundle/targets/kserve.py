"""A KServe InferenceService that serves the bundle's Triton repository with KServe's Triton runtime."""

from __future__ import annotations

import re
from pathlib import Path

from rk_export.bundle.targets.base import Deployment, Target
from rk_export.errors import InputError

# An image whose ONNX Runtime (1.28) was seen to run a bundle. The default of KServe 0.20 is 23.05 with ONNX
# Runtime 1.15, which knows neither the opset of the graph nor its IR version.
TRITON_IMAGE = "26.08-py3"
_DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
_MANIFEST = """\
# Serves the model {name} of this bundle on KServe, with the Triton runtime that KServe brings along.
# 1. Copy the folder triton/ of the bundle to the place that storageUri names.
# 2. kubectl apply -f {file}
# Requests go to /v2/models/{name}/infer.
# storageUri may be anything that KServe's storage initializer reads: pvc://CLAIM/PATH, s3://BUCKET/PATH, gs:// ...
# The memory is an estimate: twice the model's files, and 2 GiB for the server.
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {service}
spec:
  predictor:
    model:
      modelFormat:
        name: triton
        version: "2"
      runtime: kserve-tritonserver
      runtimeVersion: {image}
      protocolVersion: v2
      storageUri: {storage}
      resources:
        requests:
          memory: {memory}Gi
        limits:
          memory: {memory}Gi
"""
_GPU = """\
          nvidia.com/gpu: "1"
"""


def write_manifest(deployment: Deployment, folder: Path) -> None:
    """Write ``inferenceservice.yaml``.

    Args:
        deployment: The bundle, and where the cluster finds its ``triton`` folder.
        folder: An empty folder.

    Raises:
        InputError: No name of a Kubernetes object can be made of the model's name, or the place is no URI.
    """
    service = _service_name(deployment.name)
    storage = deployment.storage or f"pvc://{service}/triton"
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s\"'#]+", storage):
        raise InputError(
            f"{storage!r} is no place that KServe can read",
            where="--storage",
            fix="give a URI such as pvc://CLAIM/PATH or s3://BUCKET/PATH",
        )
    text = _MANIFEST.format(
        name=deployment.name,
        file=f"{folder.name}/inferenceservice.yaml",
        service=service,
        image=TRITON_IMAGE,
        storage=storage,
        memory=_memory_gib(deployment.bundle),
    )
    gpu = _GPU if deployment.ep == "cuda" else ""
    (folder / "inferenceservice.yaml").write_text(text + gpu, encoding="utf-8")


def _service_name(name: str) -> str:
    """Return the model's name as a DNS label, which names of Kubernetes services are."""
    label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    if not _DNS_LABEL.fullmatch(label):
        raise InputError(
            f"{name!r} makes no name of a KServe service: it must begin with a letter and have 63 characters at most",
            where="--name",
            fix="give another name",
        )
    return label


def _memory_gib(bundle: Path) -> int:
    files = sum(path.stat().st_size for path in bundle.glob("model.onnx*"))
    return 2 + -(-2 * files // 2**30)


TARGET = Target(
    "kserve",
    "an InferenceService manifest for KServe, served by its Triton runtime",
    write_manifest,
    needs=("triton",),
)

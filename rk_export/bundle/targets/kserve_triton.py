"""A KServe InferenceService that serves the bundle's Triton repository with KServe's Triton runtime."""

from __future__ import annotations

from pathlib import Path

from rk_export.bundle.targets.base import Deployment, Target
from rk_export.bundle.targets.cluster_names import service_name, storage_uri

# An image whose ONNX Runtime (1.28) was seen to run a bundle. The default of KServe 0.20 is 23.05 with ONNX
# Runtime 1.15, which knows neither the opset of the graph nor its IR version.
TRITON_IMAGE = "26.08-py3"
_MANIFEST = """\
# Serves the model {name} of this bundle on KServe, with the Triton runtime that KServe brings along.
# 1. Copy the bundle, or its folder triton/, to the place that storageUri names.
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
        deployment: The bundle, and where the cluster finds it.
        folder: An empty folder.

    Raises:
        InputError: No name of a Kubernetes object can be made of the model's name, or the place is no URI.
    """
    service = service_name(deployment.name, suffix="-predictor")
    text = _MANIFEST.format(
        name=deployment.name,
        file=f"{folder.name}/inferenceservice.yaml",
        service=service,
        image=TRITON_IMAGE,
        storage=f"{storage_uri(deployment, service)}/triton",
        memory=_memory_gib(deployment.bundle),
    )
    gpu = _GPU if deployment.ep == "cuda" else ""
    (folder / "inferenceservice.yaml").write_text(text + gpu, encoding="utf-8")


def _memory_gib(bundle: Path) -> int:
    files = sum(path.stat().st_size for path in bundle.glob("model.onnx*"))
    return 2 + -(-2 * files // 2**30)


TARGET = Target(
    "kserve-triton",
    "an InferenceService manifest for KServe, served by its Triton runtime",
    write_manifest,
    needs=("triton",),
    takes=("storage",),
)

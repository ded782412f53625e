"""A KServe InferenceService around `rk-export serve`, which speaks the Open Inference Protocol itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rk_export.bundle.targets.base import Deployment, Target
from rk_export.bundle.targets.cluster_names import service_name, storage_uri
from rk_export.bundle.targets.manifests import write_object
from rk_export.bundle.targets.pod_sizes import PodSize, pod_size, size_comment
from rk_export.bundle.targets.pods import METRIC_COMMENT, autoscaler, container, key_comment, pod

_SUFFIX = "-predictor"  # KServe appends it to the names of its own objects
_BUNDLE = "/mnt/models"
_COMMENT = (
    "Serves the model {name} of this bundle on KServe 0.16 or newer, with rk-export's own server.",
    "1. Build the image from samples/container, push it, and put its name below (or give --image).",
    "2. Copy the bundle to the place that uri names (or give --storage): pvc://CLAIM/PATH, s3://BUCKET/PATH, gs:// ...",
    "   KServe mounts a claim, and downloads from other places before the server starts. User 65532 must be able to",
    "   read the files. If the place asks for credentials, add the serviceAccountName that has them.",
    "3. kubectl apply -f {folder}/",
    "Requests go to /v2/models/{name}/infer and to OpenAI's routes under /v1.",
)


def write_service(deployment: Deployment, folder: Path) -> None:
    """Write ``inferenceservice.yaml`` and ``autoscaler.yaml``.

    Args:
        deployment: The bundle, its image, and where the cluster finds it.
        folder: An empty folder.

    Raises:
        InputError: The bundle has no graph, no name of a service can be made of the model's name, the place is no
            URI, or the image no image.
    """
    service, size = service_name(deployment.name, suffix=_SUFFIX), pod_size(deployment)
    comment = [line.format(name=deployment.name, folder=folder.name) for line in _COMMENT]
    comment += [*key_comment(service), *size_comment(size)]
    write_object(folder / "inferenceservice.yaml", comment, _inference_service(deployment, service, size))
    scaler = autoscaler(service, f"{service}{_SUFFIX}", size.slots)
    write_object(folder / "autoscaler.yaml", METRIC_COMMENT, scaler)


def _inference_service(deployment: Deployment, service: str, size: PodSize) -> dict[str, Any]:
    server = {"name": "kserve-container", **container(deployment, service, size, _BUNDLE)}
    server["env"] = [{"name": "PROTOCOL", "value": "v2"}, *server["env"]]
    place = {"uri": storage_uri(deployment, service), "mountPath": _BUNDLE}
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": service,
            "annotations": {
                # An ordinary Deployment, which autoscaler.yaml scales: KServe's own autoscalers know no queue.
                "serving.kserve.io/deploymentMode": "Standard",
                "serving.kserve.io/autoscalerClass": "external",
            },
        },
        "spec": {"predictor": {"storageUris": [place], **pod(server)}},
    }


TARGET = Target(
    "kserve",
    "an InferenceService for KServe, served by rk-export's own server, and its autoscaler",
    write_service,
    takes=("storage", "image"),
)

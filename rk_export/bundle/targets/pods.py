"""The pod that runs `rk-export serve`: what Kubernetes and KServe have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rk_export.bundle.targets.base import Deployment
from rk_export.bundle.targets.cluster_names import image_of
from rk_export.bundle.targets.pod_sizes import PodSize

PORT = 8000
QUEUE_METRIC = "rk_export_requests_waiting"
KEYS_VARIABLE = "RK_EXPORT_API_KEYS"
USER = 65532  # as in the Containerfile; "nonroot" in other small images
METRIC_COMMENT = (
    f"Adds replicas while requests wait. {QUEUE_METRIC} is read through the API for custom metrics, which an adapter",
    "brings to the cluster, for example prometheus-adapter. Without one the number of replicas stays as it is.",
)
GRACE = 30  # seconds that the server gives running answers after SIGTERM
_LEAVE = 5  # seconds in which the cluster takes the pod out of its services before the server stops
_PROBE = 5  # seconds between two probes
_MOST_REPLICAS = 4


def container(
    deployment: Deployment, service: str, size: PodSize, bundle: str, mounts: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Return the container of the server.

    Args:
        deployment: What is served.
        service: What the service is called.
        size: What a replica needs.
        bundle: The bundle's folder in the container.
        mounts: Volume mounts beside ``/tmp``.

    Raises:
        InputError: The image is no reference to one.
    """
    resources: dict[str, Any] = {"cpu": str(size.cpus), "memory": f"{size.memory_gib}Gi"}
    gpu = {"nvidia.com/gpu": "1"} if deployment.ep == "cuda" else {}
    return {
        "image": image_of(deployment),
        "args": arguments(deployment, size, bundle),
        "env": [_keys(service)],
        "ports": [{"name": "http", "containerPort": PORT, "protocol": "TCP"}],
        "resources": {"requests": {**resources, **gpu}, "limits": {**resources, **gpu}},
        "startupProbe": {**_probe("ready"), "failureThreshold": -(-size.start_seconds // _PROBE)},
        "livenessProbe": {**_probe("live"), "timeoutSeconds": 5, "failureThreshold": 6},
        "readinessProbe": {**_probe("ready"), "failureThreshold": 2},
        "lifecycle": {"preStop": {"sleep": {"seconds": _LEAVE}}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "runAsUser": USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "volumeMounts": [*mounts, {"name": "tmp", "mountPath": "/tmp"}],
    }


def arguments(deployment: Deployment, size: PodSize, bundle: str) -> list[str]:
    """Return the command line after ``rk-export``."""
    return [
        "serve",
        bundle,
        "--host=0.0.0.0",
        f"--port={PORT}",
        f"--name={deployment.name}",
        f"--provider={deployment.ep}",
        f"--threads={size.cpus}",
        f"--slots={size.slots}",
        f"--context={size.capacity}",
        f"--grace={GRACE}",
    ]


def key_comment(service: str) -> tuple[str, ...]:
    """Return how to ask for API keys, for the head of a manifest."""
    return (
        "Without the secret that env names, the server answers everybody. To ask for API keys, make it first:",
        f"  kubectl create secret generic {service}-api-keys --from-literal=keys=KEY1,KEY2",
    )


def _keys(service: str) -> dict[str, Any]:
    reference = {"name": f"{service}-api-keys", "key": "keys", "optional": True}
    return {"name": KEYS_VARIABLE, "valueFrom": {"secretKeyRef": reference}}


def pod(container: dict[str, Any], volumes: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return the fields of a pod around its container."""
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": _LEAVE + GRACE + 10,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [*volumes, {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}}],
    }


def autoscaler(name: str, deployment: str, slots: int) -> dict[str, Any]:
    """Return an autoscaler that adds replicas while requests wait.

    Args:
        name: Its own name.
        deployment: The Deployment that is scaled.
        slots: Requests that a replica decodes together; a queue of half of them is the target.
    """
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": name},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment},
            "minReplicas": 1,
            "maxReplicas": _MOST_REPLICAS,
            "metrics": [
                {
                    "type": "Pods",
                    "pods": {
                        "metric": {"name": QUEUE_METRIC},
                        "target": {"type": "AverageValue", "averageValue": str(max(1, slots // 2))},
                    },
                }
            ],
        },
    }


def _probe(state: str) -> dict[str, Any]:
    return {"httpGet": {"path": f"/health/{state}", "port": "http"}, "periodSeconds": _PROBE}

"""A kustomize base that serves a bundle with `rk-export serve` in any Kubernetes cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rk_export.bundle.targets.base import Deployment, Target
from rk_export.bundle.targets.cluster_names import service_name, volume_claim
from rk_export.bundle.targets.kubernetes_objects import (
    cluster_service,
    disruption_budget,
    head,
    network_policy,
    service_account,
)
from rk_export.bundle.targets.manifests import write_object
from rk_export.bundle.targets.pod_sizes import PodSize, pod_size, size_comment
from rk_export.bundle.targets.pods import METRIC_COMMENT, PORT, autoscaler, container, key_comment, pod

_BUNDLE = "/bundle"
_KUSTOMIZATION = (
    "Serves the model {name} of this bundle with rk-export's own server.",
    "1. Build the image from samples/container and push it. `kustomize edit set image`, or --image, names yours.",
    "2. Copy the bundle into the persistent volume claim {claim}, to /{path} (or give --storage pvc://CLAIM/PATH).",
    "   Several replicas read it, so it needs the access mode ReadOnlyMany or ReadWriteMany.",
    "3. kubectl apply -k {folder}",
    "An overlay that lists this folder under resources keeps your own changes apart.",
)
_DEPLOYMENT = (
    "The claim is mounted read-only, and user 65532 must be able to read the files.",
    "If the bundle is baked into the image instead, drop the volume, and name its folder in args.",
)
_POLICY = (
    "Pods of this namespace may ask the server, and those of the namespace `monitoring` may read its metrics: put the",
    "names of your ingress controller's and Prometheus's namespaces here. The server itself calls nobody.",
)


def write_base(deployment: Deployment, folder: Path) -> None:
    """Write ``kustomization.yaml`` and the objects that it lists.

    Args:
        deployment: The bundle, its image, and where the cluster finds it.
        folder: An empty folder.

    Raises:
        InputError: The bundle has no graph, no name of a service can be made of the model's name, the place is no
            persistent volume claim, or the image no image.
    """
    service, size = service_name(deployment.name), pod_size(deployment)
    claim, path = volume_claim(deployment, service)
    labels = {"app.kubernetes.io/name": "rk-export", "app.kubernetes.io/instance": service}
    scaler = autoscaler(service, service, size.slots)
    objects = {
        "serviceaccount.yaml": ((), service_account(service)),
        "deployment.yaml": (
            (*_DEPLOYMENT, *key_comment(service), *size_comment(size)),
            _deployment(deployment, service, size, labels),
        ),
        "service.yaml": ((), cluster_service(service, labels)),
        "autoscaler.yaml": (METRIC_COMMENT, scaler),
        "disruption.yaml": ((), disruption_budget(service, labels)),
        "networkpolicy.yaml": (_POLICY, network_policy(service, labels)),
    }
    for name, (notes, value) in objects.items():
        write_object(folder / name, notes, value)
    facts = {"name": deployment.name, "claim": claim, "path": path, "folder": folder.name}
    comment = [line.format(**facts) for line in _KUSTOMIZATION]
    write_object(folder / "kustomization.yaml", comment, _kustomization(list(objects), labels))


def _kustomization(names: list[str], labels: dict[str, str]) -> dict[str, Any]:
    return {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": names,
        "labels": [{"pairs": labels}],
    }


def _deployment(
    deployment: Deployment, service: str, size: PodSize, labels: dict[str, str]
) -> dict[str, Any]:
    claim, path = volume_claim(deployment, service)
    mount = {"name": "bundle", "mountPath": _BUNDLE, "readOnly": True, **({"subPath": path} if path else {})}
    volume = {"name": "bundle", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
    server = {"name": "server", **container(deployment, service, size, _BUNDLE, [mount])}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels},
    }
    scraped = {
        "prometheus.io/scrape": "true",
        "prometheus.io/port": str(PORT),
        "prometheus.io/path": "/metrics",
    }
    return {
        **head("apps/v1", "Deployment", service),
        "spec": {  # without replicas: their number is the autoscaler's
            "selector": {"matchLabels": labels},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
            "template": {
                "metadata": {"labels": labels, "annotations": scraped},
                "spec": {
                    "serviceAccountName": service,
                    **pod(server, [volume]),
                    "topologySpreadConstraints": [spread],
                },
            },
        },
    }


TARGET = Target(
    "kubernetes",
    "a kustomize base: rk-export's own server with probes, limits, autoscaling and a network policy",
    write_base,
    takes=("storage", "image"),
)

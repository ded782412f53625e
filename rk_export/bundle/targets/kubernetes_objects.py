"""The small objects beside the Deployment of a server: account, service, disruption budget, network policy."""

from __future__ import annotations

from typing import Any


def service_account(service: str) -> dict[str, Any]:
    """Return an account without a token: the server never asks the cluster anything."""
    return {**head("v1", "ServiceAccount", service), "automountServiceAccountToken": False}


def cluster_service(service: str, labels: dict[str, str]) -> dict[str, Any]:
    """Return a service inside the cluster, on port 80."""
    port = {"name": "http", "port": 80, "targetPort": "http", "protocol": "TCP"}
    return {
        **head("v1", "Service", service),
        "spec": {"type": "ClusterIP", "selector": labels, "ports": [port]},
    }


def disruption_budget(service: str, labels: dict[str, str]) -> dict[str, Any]:
    """Return a budget that lets nodes be drained one replica at a time."""
    spec = {"maxUnavailable": 1, "selector": {"matchLabels": labels}}
    return {**head("policy/v1", "PodDisruptionBudget", service), "spec": spec}


def network_policy(service: str, labels: dict[str, str]) -> dict[str, Any]:
    """Return a policy that lets nothing out, and in only this namespace and that of the monitoring."""
    monitoring = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    port = {"port": "http", "protocol": "TCP"}
    return {
        **head("networking.k8s.io/v1", "NetworkPolicy", service),
        "spec": {
            "podSelector": {"matchLabels": labels},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {}}, monitoring], "ports": [port]}],
            "egress": [],
        },
    }


def head(api: str, kind: str, name: str) -> dict[str, Any]:
    """Return what every object begins with."""
    return {"apiVersion": api, "kind": kind, "metadata": {"name": name}}

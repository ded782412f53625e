"""What a cluster is given to run `rk-export serve`: every field that keeps it safe, alive, scaled and in bounds.

The schemas of Kubernetes and KServe check the same files in `tests/kubernetes_env`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from deployable import write_graph
from encoder_bundles import write_classifier

from rk_export.bundle.targets import kserve, kubernetes
from rk_export.bundle.targets.base import Deployment
from rk_export.bundle.targets.pod_sizes import cache_bytes, pod_size
from rk_export.cli.parser import build_parser
from rk_export.cli.serve import KEYS_VARIABLE, settings_of
from rk_export.errors import InputError
from rk_export.runtime.server.metrics import Metrics
from rk_export.runtime.server.models import Models
from rk_export.runtime.server.settings import ServerSettings

GIB = 2**30
TARGETS = {"kserve": kserve.TARGET, "kubernetes": kubernetes.TARGET}
KINDS = {
    "serviceaccount.yaml": "ServiceAccount",
    "deployment.yaml": "Deployment",
    "service.yaml": "Service",
    "autoscaler.yaml": "HorizontalPodAutoscaler",
    "disruption.yaml": "PodDisruptionBudget",
    "networkpolicy.yaml": "NetworkPolicy",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "bundle"
    made.mkdir()
    write_graph(made)
    return made


def written(target: str, deployment: Deployment) -> dict[str, Any]:
    """Return the objects that a target writes, by file."""
    place = deployment.bundle.parent / target
    place.mkdir()
    TARGETS[target].write(deployment, place)
    return {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in place.iterdir()}


def pod_of(target: str, files: dict[str, Any]) -> Any:
    if target == "kserve":
        return files["inferenceservice.yaml"]["spec"]["predictor"]
    return files["deployment.yaml"]["spec"]["template"]["spec"]


def with_weights(folder: Path, size: int) -> Path:
    with (folder / "model.onnx.data").open("r+b") as file:
        file.truncate(size - (folder / "model.onnx").stat().st_size)  # takes no space on the disk
    return folder


@pytest.mark.parametrize("target", TARGETS)
def test_the_container_is_confined(folder: Path, target: str) -> None:
    pod = pod_of(target, written(target, Deployment(folder, "m")))
    (container,) = pod["containers"]
    inside = container["securityContext"]
    assert (inside["runAsNonRoot"], inside["readOnlyRootFilesystem"]) == (True, True)
    assert inside["allowPrivilegeEscalation"] is False
    assert inside["capabilities"] == {"drop": ["ALL"]}
    assert inside["seccompProfile"] == pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert inside["runAsUser"] > 0
    assert pod["automountServiceAccountToken"] is False
    places = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert "sizeLimit" in volumes[places["/tmp"]]["emptyDir"]
    assert set(places.values()) == set(volumes)


@pytest.mark.parametrize("target", TARGETS)
def test_the_server_has_time_to_load_and_to_end(folder: Path, target: str) -> None:
    with_weights(folder, 3 * GIB)
    pod = pod_of(target, written(target, Deployment(folder, "m")))
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000}
    for probe, path in {"startup": "ready", "liveness": "live", "readiness": "ready"}.items():
        assert container[f"{probe}Probe"]["httpGet"] == {"path": f"/health/{path}", "port": "http"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 60 + 3 * GIB / 50e6 * 0.95
    leave = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > leave + 30


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("ep", ["cpu", "cuda"])
def test_limits_equal_requests_and_the_engine_takes_the_cores_it_has(
    folder: Path, target: str, ep: Any
) -> None:
    with_weights(folder, GIB)
    (container,) = pod_of(target, written(target, Deployment(folder, "m", ep)))["containers"]
    limits = container["resources"]["limits"]
    assert limits == container["resources"]["requests"]
    # 4,096 positions of 16 rows, 2 heads of 16 floats: 8 MiB, which the next whole GiB covers.
    expected = {
        "cpu": {"cpu": "4", "memory": "4Gi"},
        "cuda": {"cpu": "2", "memory": "3Gi", "nvidia.com/gpu": "1"},
    }
    assert limits == expected[ep]
    assert {f"--provider={ep}", f"--threads={limits['cpu']}", "--host=0.0.0.0"} <= set(container["args"])
    assert container["image"].endswith("-cuda") is (ep == "cuda")


@pytest.mark.parametrize("target", TARGETS)
def test_api_keys_come_from_a_secret_where_there_is_one(folder: Path, target: str) -> None:
    (container,) = pod_of(target, written(target, Deployment(folder, "My_model")))["containers"]
    (keys,) = (one for one in container["env"] if one["name"] == "RK_EXPORT_API_KEYS")
    assert keys["valueFrom"]["secretKeyRef"] == {"name": "my-model-api-keys", "key": "keys", "optional": True}


@pytest.mark.parametrize("target", TARGETS)
def test_the_server_understands_its_arguments_and_shows_the_metric(folder: Path, target: str) -> None:
    files = written(target, Deployment(folder, "My_model"))
    (container,) = pod_of(target, files)["containers"]
    args = build_parser().parse_args(container["args"])
    settings = settings_of(args)
    size = pod_size(Deployment(folder, "My_model"))
    assert (settings.host, settings.port, args.name) == ("0.0.0.0", 8000, ["My_model"])
    assert (settings.engine.slots, settings.engine.capacity) == (size.slots, size.capacity)
    assert settings.grace < pod_of(target, files)["terminationGracePeriodSeconds"]
    assert [str(path) for path in args.bundles] in (["/mnt/models"], ["/bundle"])
    assert container["env"][-1]["name"] == KEYS_VARIABLE
    shown = Metrics(SimpleNamespace(served={})).page().decode()
    scaler = files["autoscaler.yaml"]["spec"]["metrics"][0]["pods"]
    assert f"# TYPE {scaler['metric']['name']} gauge\n" in shown


def test_memory_grows_with_the_cache_up_to_a_capacity(folder: Path) -> None:
    graph = folder / "model.onnx"
    assert cache_bytes(graph) == 2 * 16 * 4
    sizes = []
    for context in (512, 4096, 131072):
        (folder / "config.json").write_text(json.dumps({"max_position_embeddings": context}))
        sizes.append(pod_size(Deployment(folder, "m")).capacity)
    assert sizes == [512, 4096, 4096]


def test_a_small_model_gets_one_core_and_a_large_one_no_more_than_sixteen(folder: Path) -> None:
    assert pod_size(Deployment(folder, "m")).cpus == 1
    assert pod_size(Deployment(with_weights(folder, 100 * GIB), "m")).cpus == 16


@pytest.mark.parametrize(
    ("target", "scaled"), [("kserve", "tiny-llama-v2-predictor"), ("kubernetes", "tiny-llama-v2")]
)
def test_replicas_follow_the_queue(folder: Path, target: str, scaled: str) -> None:
    scaler = written(target, Deployment(folder, "Tiny_Llama.v2"))["autoscaler.yaml"]
    assert (scaler["apiVersion"], scaler["kind"]) == ("autoscaling/v2", "HorizontalPodAutoscaler")
    spec = scaler["spec"]
    assert spec["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": scaled}
    assert spec["minReplicas"] < spec["maxReplicas"]
    (metric,) = spec["metrics"]
    assert metric["pods"]["metric"] == {"name": "rk_export_requests_waiting"}
    assert metric["pods"]["target"] == {"type": "AverageValue", "averageValue": "4"}


def test_kserve_gets_a_container_and_leaves_scaling_to_us(folder: Path) -> None:
    files = written("kserve", Deployment(folder, "Tiny_Llama.v2", image="registry.example:5000/team/serve:3"))
    service = files["inferenceservice.yaml"]
    assert set(files) == {"inferenceservice.yaml", "autoscaler.yaml"}
    assert (service["apiVersion"], service["kind"]) == ("serving.kserve.io/v1beta1", "InferenceService")
    assert service["metadata"]["name"] == "tiny-llama-v2"
    assert service["metadata"]["annotations"] == {
        "serving.kserve.io/deploymentMode": "Standard",
        "serving.kserve.io/autoscalerClass": "external",
    }
    predictor = service["spec"]["predictor"]
    (place,) = predictor["storageUris"]
    assert place == {"uri": "pvc://models/tiny-llama-v2", "mountPath": "/mnt/models"}
    (container,) = predictor["containers"]
    assert container["name"] == "kserve-container"
    assert container["image"] == "registry.example:5000/team/serve:3"
    assert container["args"][:2] == ["serve", "/mnt/models"]
    assert "--name=Tiny_Llama.v2" in container["args"]
    assert {"name": "PROTOCOL", "value": "v2"} in container["env"]


def test_the_base_lists_every_object_and_all_of_them_find_the_pods(folder: Path) -> None:
    files = written("kubernetes", Deployment(folder, "Tiny_Llama.v2"))
    base = files.pop("kustomization.yaml")
    assert sorted(base["resources"]) == sorted(files)
    assert {name: value["kind"] for name, value in files.items()} == KINDS
    assert {value["metadata"]["name"] for value in files.values()} == {"tiny-llama-v2"}

    template = files["deployment.yaml"]["spec"]["template"]
    labels = template["metadata"]["labels"]
    assert base["labels"] == [{"pairs": labels}]
    assert files["deployment.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert files["disruption.yaml"]["spec"]["selector"]["matchLabels"] == labels
    assert files["networkpolicy.yaml"]["spec"]["podSelector"]["matchLabels"] == labels
    assert files["service.yaml"]["spec"]["selector"] == labels
    assert files["service.yaml"]["spec"]["ports"][0]["targetPort"] == "http"
    assert files["networkpolicy.yaml"]["spec"]["egress"] == []
    assert files["networkpolicy.yaml"]["spec"]["ingress"][0]["ports"] == [{"port": "http", "protocol": "TCP"}]
    assert template["spec"]["serviceAccountName"] == files["serviceaccount.yaml"]["metadata"]["name"]
    assert "replicas" not in files["deployment.yaml"]["spec"]  # applying it again would undo the autoscaler's


@pytest.mark.parametrize(
    ("storage", "claim", "path"),
    [(None, "models", "m"), ("pvc://shared/a/b/", "shared", "a/b"), ("pvc://only-this", "only-this", None)],
)
def test_kubernetes_mounts_a_folder_of_a_claim(
    folder: Path, storage: str | None, claim: str, path: str | None
) -> None:
    pod = pod_of("kubernetes", written("kubernetes", Deployment(folder, "m", storage=storage)))
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "bundle")
    assert volume["persistentVolumeClaim"] == {"claimName": claim, "readOnly": True}
    mount = next(mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == "bundle")
    assert (mount["mountPath"], mount["readOnly"], mount.get("subPath")) == ("/bundle", True, path)


Change = Callable[[Path], Deployment]


@pytest.mark.parametrize(
    ("target", "change", "message"),
    [
        *((target, lambda b: Deployment(b, "7b"), "--name: '7b' makes no name") for target in TARGETS),
        *((target, lambda b: Deployment(b, "_"), "--name: '_' makes no name") for target in TARGETS),
        ("kserve", lambda b: Deployment(b, "m" * 54), "--name: .*begin with a letter and have 53 characters"),
        ("kubernetes", lambda b: Deployment(b, "m" * 64), "--name: .*and have 63 characters"),
        ("kserve", lambda b: Deployment(b, "m", storage="models/m"), "--storage: 'models/m' is no place"),
        ("kserve", lambda b: Deployment(b, "m", storage="s3://a b"), "--storage: 's3://a b' is no place"),
        (
            "kubernetes",
            lambda b: Deployment(b, "m", storage="s3://a/m"),
            "--storage: .* no persistent volume",
        ),
        (
            "kubernetes",
            lambda b: Deployment(b, "m", storage="pvc://a/../b"),
            "--storage: .* no persistent volume",
        ),
        (
            "kubernetes",
            lambda b: Deployment(b, "m", storage="pvc://A/b"),
            "--storage: .* no persistent volume",
        ),
        *((target, lambda b: Deployment(b, "m", image="a b"), "--image: 'a b' is no") for target in TARGETS),
        *((target, lambda b: Deployment(b, "m", image="a:\n"), "--image: .* is no") for target in TARGETS),
    ],
)
def test_what_a_cluster_would_refuse_is_refused(
    folder: Path, target: str, change: Change, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        written(target, change(folder))
    assert not list((folder.parent / target).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_the_longest_names_and_every_form_of_image_pass(folder: Path, target: str) -> None:
    longest = "m" * (53 if target == "kserve" else 63)
    digest = f"registry.example/a/b:1@sha256:{'0' * 64}"
    pod = pod_of(target, written(target, Deployment(folder, longest, image=digest)))
    assert pod["containers"][0]["image"] == digest


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_without_a_graph_is_refused(folder: Path, target: str) -> None:
    (folder / "model.onnx").unlink()
    with pytest.raises(InputError, match=r"model\.onnx is missing"):
        written(target, Deployment(folder, "m"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_classifier_is_refused_as_the_server_refuses_it(tmp_path: Path, target: str) -> None:
    classifier = write_classifier(tmp_path / "classifier")
    with pytest.raises(InputError, match="a classifier, and rk-export's server"):
        written(target, Deployment(classifier, "m"))
    with pytest.raises(InputError, match="a classifier, and the server"):
        Models({"m": classifier}, ServerSettings())

"""Manifests of every form against Kubernetes' schemas and KServe's types; kustomize builds the base.

Runs in an environment of its own (``make test-kubernetes``): the schemas are large.
"""

from __future__ import annotations

import copy
import importlib
import shutil
import subprocess
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("kubernetes_validate", reason="needs the schemas: run `make test-kubernetes`")

import kubernetes_validate
import yaml
from deployable import write_graph

from rk_export.bundle.targets import TARGETS
from rk_export.bundle.targets.base import Deployment

ROOT = Path(__file__).parents[2]
WRITERS = {target.name: target for target in TARGETS}
VERSIONS = [
    "1.30",
    "1.34",
    kubernetes_validate.latest_version(),
]  # the pause before the end is known from 1.30 on
SERVED = ["kserve", "kserve-triton"]

Place = Callable[..., Path]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Return a function that writes a target's files and returns their folder."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    write_graph(bundle)

    def write(target: str, name: str = "m", ep: Any = "cpu", size: int = 0, **options: str) -> Path:
        if size:
            with (bundle / "model.onnx.data").open("r+b") as file:
                file.truncate(size)  # takes no space on the disk
        folder = tmp_path / target
        folder.mkdir()
        WRITERS[target].write(Deployment(bundle, name, ep, **options), folder)
        return folder

    return write


def objects(folder: Path) -> dict[str, Any]:
    return {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.iterdir())}


def kserve_class(name: str) -> Any:
    """Return one of KServe's classes, without its package's own imports: a web server and forty packages more."""
    folder = Path(sysconfig.get_paths()["purelib"]) / "kserve"
    for module, path in {"kserve": folder, "kserve.models": folder / "models"}.items():
        if module not in sys.modules:
            sys.modules[module] = types.ModuleType(module)
            sys.modules[module].__path__ = [str(path)]  # type: ignore[attr-defined]
    words = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")
    try:
        return getattr(importlib.import_module(f"kserve.models.{words}"), name)
    except ModuleNotFoundError:
        return getattr(importlib.import_module("kubernetes.client"), name)


def faults(kind: str, value: Any, where: str = "") -> Iterator[str]:
    """Yield what is wrong with a value of a type as the clients of Kubernetes and KServe name it."""
    if kind.startswith("list["):
        for index, item in enumerate(value if isinstance(value, list) else []):
            yield from faults(kind[5:-1], item, f"{where}[{index}]")
        wrong = not isinstance(value, list)
    elif kind.startswith("dict("):
        wrong = not isinstance(value, dict) or any(not isinstance(one, str) for one in value.values())
    elif kind in ("str", "int", "bool", "float"):
        wrong = type(value).__name__ != kind
    elif kind == "object":
        wrong = False
    else:
        yield from _object_faults(kserve_class(kind), value, where)
        wrong = False
    if wrong:
        yield f"{where}: {value!r} is no {kind}"


def _object_faults(kind: Any, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: {value!r} is no {kind.__name__}"
        return
    fields = {outside: inside for inside, outside in kind.attribute_map.items()}
    for name, part in value.items():
        if name in fields:
            yield from faults(kind.openapi_types[fields[name]], part, f"{where}.{name}")
        else:
            yield f"{where}.{name}: unknown to {kind.__name__}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("ep", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "size", "storage"),
    [("m", 0, "pvc://claim"), ("Tiny_Llama.v2", 2**31, "pvc://claim/a/b"), ("m" * 53, 2**36, "pvc://c.d/e")],
)
def test_every_object_of_kubernetes_fits_its_schema(
    place: Place, version: str, ep: str, name: str, size: int, storage: str
) -> None:
    seen = set()
    for target in ("kubernetes", "kserve"):
        for value in objects(place(target, name, ep, size, storage=storage)).values():
            if value["kind"] in ("Kustomization", "InferenceService"):
                continue
            kubernetes_validate.validate(value, version, strict=True)
            seen.add(value["kind"])
    assert len(seen) == 6


@pytest.mark.parametrize("target", SERVED)
@pytest.mark.parametrize("ep", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("name", "storage"), [("m", None), ("Tiny_Llama.v2", "s3://bucket/a"), ("m" * 53, "pvc://claim/a")]
)
def test_kserves_object_fits_its_types(
    place: Place, target: str, ep: str, name: str, storage: str | None
) -> None:
    found = objects(place(target, name, ep, storage=storage))["inferenceservice.yaml"]
    assert list(faults("V1beta1InferenceService", found)) == []


@pytest.mark.parametrize("version", VERSIONS)
def test_the_pod_of_kserve_fits_the_schema_of_pods(place: Place, version: str) -> None:
    predictor = objects(place("kserve", ep="cuda"))["inferenceservice.yaml"]["spec"]["predictor"]
    spec = {name: value for name, value in predictor.items() if name != "storageUris"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "m"}, "spec": spec}
    kubernetes_validate.validate(pod, version, strict=True)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "replica"), 1),
        (("spec", "template", "spec", "terminationGracePeriodSeconds"), "45"),
        (("spec", "template", "spec", "containers", 0, "securityContext", "readOnlyRootFileSystem"), True),
        (("spec", "template", "spec", "containers", 0, "resources", "limits"), 4),
    ],
)
def test_a_wrong_field_is_seen(place: Place, path: tuple[Any, ...], value: Any) -> None:
    found = objects(place("kubernetes"))["deployment.yaml"]
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(changed(found, path, value), VERSIONS[-1], strict=True)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("spec", "predictor", "storageURIs"), [], "storageURIs: unknown"),
        (("spec", "predictor", "storageUris"), "pvc://m", "is no list"),
        (("spec", "predictor", "storageUris", 0, "path"), "/mnt", "path: unknown"),
        (("spec", "predictor", "containers", 0, "livenessProbe", "periodSeconds"), "5", "is no int"),
        (("metadata", "annotations", "a"), True, "is no dict"),
    ],
)
def test_a_wrong_field_of_kserve_is_seen(
    place: Place, path: tuple[Any, ...], value: Any, message: str
) -> None:
    found = changed(objects(place("kserve"))["inferenceservice.yaml"], path, value)
    (fault,) = faults("V1beta1InferenceService", found)
    assert message in fault


def changed(value: Any, path: tuple[Any, ...], to: Any) -> Any:
    """Return a copy with one field changed."""
    copied = part = copy.deepcopy(value)
    for step in path[:-1]:
        part = part[step]
    part[path[-1]] = to
    return copied


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kustomize comes with kubectl")
@pytest.mark.parametrize("ep", ["cpu", "cuda"])
def test_kustomize_builds_the_base(place: Place, ep: str) -> None:
    folder = place("kubernetes", "Tiny_Llama.v2", ep)
    done = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    built = {value["kind"]: value for value in yaml.safe_load_all(done.stdout)}
    written = {value["kind"]: value for value in objects(folder).values()}
    labels = written.pop("Kustomization")["labels"][0]["pairs"]
    assert built.keys() == written.keys()
    for kind, value in built.items():
        assert value["metadata"].pop("labels") == labels
        assert value == written[kind]


def test_hadolint_has_nothing_to_say_about_the_containerfile() -> None:
    linter = Path(sys.executable).parent / "hadolint"
    file = ROOT / "samples" / "container" / "Containerfile"
    done = subprocess.run([str(linter), str(file)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    worse = file.read_text(encoding="utf-8").replace("USER 65532:65532", "USER root")
    done = subprocess.run([str(linter), "-"], input=worse, capture_output=True, text=True, check=False)
    assert "DL3002" in done.stdout

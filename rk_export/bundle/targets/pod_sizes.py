"""How much memory and how many cores a server of a bundle asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import onnx

from rk_export.bundle.targets.base import Deployment
from rk_export.errors import InputError
from rk_export.runtime.bundle_config import BundleConfig
from rk_export.runtime.encoder_graph import is_classifier_bundle
from rk_export.runtime.engine.records import EngineOptions

_FORMULA = (
    "The sizes are estimates, W being the bytes of model.onnx*:",
    "  memory = 2 W (mapped, and packed for the processor) + (slots + kept prefixes) x capacity x keys and values of a",
    "           position + 1 GiB; the keys and values lie on the GPU where there is one",
    "  cpu    = W in GiB x slots / 2, from 1 to 16; 2 beside a GPU",
)
_CAPACITY = 4096  # positions of a slot where the model has more: GenAI's default in our bundles is the same
_SERVER = 1 << 30
_GIB = 1 << 30
_MOST_CPUS = 16
_CPUS_BESIDE_GPU = 2
_LOADED_A_SECOND = 50 << 20  # bytes; a slow network disk
_SIZES = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2}


@dataclass(frozen=True)
class PodSize:
    """What one replica needs.

    Args:
        memory_gib: Host memory in GiB.
        cpus: Cores, which are also the threads of ONNX Runtime.
        slots: Requests that are decoded together.
        capacity: Positions of prompt and answer of each.
        start_seconds: Longest time until the model is loaded.
    """

    memory_gib: int
    cpus: int
    slots: int
    capacity: int
    start_seconds: int


def size_comment(size: PodSize) -> tuple[str, ...]:
    """Return how a size came about, for the head of a manifest."""
    return (*_FORMULA, f"  with {size.slots} slots and a capacity of {size.capacity} positions")


def pod_size(deployment: Deployment) -> PodSize:
    """Compute what a replica needs from the size of the graph, its cache and the engine's slots.

    A dense bundle of 538 MB took 0.7 GiB once open, and 2.4 GiB after 8 requests at once; it is given 5 GiB.
    One core decodes about 18 tokens a second for each of 8 rows of a model of 145 MB: hence two GiB x slots a core.

    Raises:
        InputError: The bundle has no graph, or it is that of a classifier, which the server does not serve.
    """
    graph = deployment.bundle / "model.onnx"
    if not graph.is_file():
        raise InputError("model.onnx is missing", where=str(deployment.bundle), fix="export the bundle again")
    if is_classifier_bundle(deployment.bundle):
        raise InputError(
            "a classifier, and rk-export's server gives texts and vectors",
            where=str(deployment.bundle),
            fix="take --for triton or kserve-triton",
        )
    options = EngineOptions()
    files = sum(path.stat().st_size for path in deployment.bundle.glob("model.onnx*"))
    capacity = min(BundleConfig.read(deployment.bundle).context_length or _CAPACITY, _CAPACITY)
    kept = (options.slots + options.kept_prefixes) * capacity * cache_bytes(graph)
    on_gpu = deployment.ep == "cuda"
    return PodSize(
        memory_gib=math.ceil((2 * files + (0 if on_gpu else kept) + _SERVER) / _GIB),
        cpus=_CPUS_BESIDE_GPU if on_gpu else _cpus(files, options.slots),
        slots=options.slots,
        capacity=capacity,
        start_seconds=60 + math.ceil(files / _LOADED_A_SECOND),
    )


def _cpus(files: int, slots: int) -> int:
    return min(_MOST_CPUS, max(1, math.ceil(files / _GIB * slots / 2)))


def cache_bytes(model: Path) -> int:
    """Return the bytes of keys and values that one position of one row takes; 0 for an encoder."""
    graph = onnx.load(model, load_external_data=False).graph
    tensors = [v.type.tensor_type for v in graph.input if v.name.startswith("past_key_values.")]
    # Batch and length are symbols; the heads and their size are numbers.
    return sum(
        _SIZES.get(tensor.elem_type, 4) * math.prod(d.dim_value for d in tensor.shape.dim if d.dim_value)
        for tensor in tensors
    )

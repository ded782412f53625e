"""Triton model repository of a bundle, for the Python backend: text in, text out, answered by our engine."""

from __future__ import annotations

from pathlib import Path

from rk_export.bundle.targets.base import Deployment, Target
from rk_export.bundle.targets.links import link_or_copy
from rk_export.errors import InputError
from rk_export.manifest import read_manifest, write_part
from rk_export.runtime.bundle_files import TOKENIZER_FILE
from rk_export.runtime.chat_files import MORE_TEMPLATES
from rk_export.runtime.encoder_graph import is_encoder_bundle
from rk_export.runtime.engine.records import EngineOptions
from rk_export.runtime.triton.tensors import BUNDLE_FOLDER, INPUTS, OUTPUTS, TextTensor

_MODEL = '''\
"""Answers requests with the bundle that lies beside this file; rk-export does the work."""

import triton_python_backend_utils as pb_utils
from rk_export.runtime.triton.model import TritonModel


class TritonPythonModel(TritonModel):
    utils = pb_utils
'''
# One process: its engine decodes the requests of all clients together. The kind says nothing about the provider.
_CONFIG = """\
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: true }}
{tensors}instance_group [ {{ kind: KIND_CPU, count: 1 }} ]
{parameters}"""


def write_python_repository(deployment: Deployment, folder: Path) -> None:
    """Write ``NAME/`` into a folder; Triton is then started with ``--model-repository`` of that folder.

    The bundle's files appear below the version folder as hard links, or as copies where there are none.

    Args:
        deployment: The bundle, with its manifest, and the name of the served model.
        folder: The model repository, an empty folder.

    Raises:
        InputError: The bundle cannot continue a text: it is an encoder, or has no tokenizer.
    """
    _check(deployment.bundle)
    version = folder / deployment.name / "1"
    files = [name for name in read_manifest(deployment.bundle)["files"] if _is_read(name)]
    for name in files:
        link_or_copy(deployment.bundle / name, version / BUNDLE_FOLDER / name)
    write_part(deployment.bundle, version / BUNDLE_FOLDER, files)
    (version / "model.py").write_text(_MODEL, encoding="utf-8")
    (version.parent / "config.pbtxt").write_text(_config(deployment), encoding="utf-8")


def _check(bundle: Path) -> None:
    if is_encoder_bundle(bundle):
        raise InputError("an encoder writes no text", where=str(bundle), fix="take --for triton")
    if not (bundle / TOKENIZER_FILE).is_file():
        raise InputError(f"{TOKENIZER_FILE} is missing", where=str(bundle), fix="take --for triton")


def _is_read(name: str) -> bool:
    """Whether a file belongs to the bundle itself, and not to a deployment target."""
    return "/" not in name or name.startswith(f"{MORE_TEMPLATES}/")


def _config(deployment: Deployment) -> str:
    tensors = [_tensor("input", one, " optional: true") for one in INPUTS]
    tensors += [_tensor("output", one, "") for one in OUTPUTS]
    defaults = EngineOptions()
    values = {
        "provider": deployment.ep,
        "slots": defaults.slots,
        "queue": defaults.queue,
    }
    parameters = [
        f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        for key, value in values.items()
    ]
    return _CONFIG.format(name=deployment.name, tensors="".join(tensors), parameters="".join(parameters))


def _tensor(role: str, tensor: TextTensor, more: str) -> str:
    size = -1 if tensor.many else 1
    return f'{role} [ {{ name: "{tensor.name}" data_type: {tensor.type} dims: [ {size} ]{more} }} ]\n'


TARGET = Target(
    "triton-python",
    "a model repository for Triton's Python backend: text in, text out, streamed; hard links to the bundle",
    write_python_repository,
)

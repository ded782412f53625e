"""Look at the installation: versions, packages that overwrite each other, and what really runs.

Nothing is believed that can be tried: ONNX Runtime lists execution providers that it cannot load, and package
metadata outlives the files it describes. Each check says what was found, why that matters and how to fix it.
"""

from __future__ import annotations

import enum
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from rk_export.commands.environment_probes import Trial, try_out
from rk_export.json_codec import to_json
from rk_export.report.table import Block, Column, make_table

DISTRIBUTION = "rk-export"

# Distributions that install into one folder: the last one wins, removing any of them breaks the rest.
_RUNTIMES = (
    "onnxruntime-gpu",
    "onnxruntime",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)
_GENAI = ("onnxruntime-genai-cuda", "onnxruntime-genai", "onnxruntime-genai-directml")
_PROBES = ("cpu", "cuda", "torch", "export")


class Status(enum.StrEnum):
    """Whether a check is fine, limits what can be done, or keeps the CPU from working."""

    OK = "ok"
    NOTICE = "notice"
    PROBLEM = "PROBLEM"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Args:
        name: A package, an execution provider or a device.
        status: The verdict.
        found: What is there.
        why: Why it is not fine; empty where it is.
        fix: What to do about it; empty where nothing is to be done.
    """

    name: str
    status: Status
    found: str
    why: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Every check; :attr:`ok` says whether export and inference on the CPU work."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True where no check is a problem; a missing GPU is none."""
        return all(check.status is not Status.PROBLEM for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready dictionary: ``ok`` and the checks."""
        return {"ok": self.ok, **to_json(self)}

    def blocks(self) -> tuple[Block, ...]:
        """Return what to print: a table with one line a check, then why and how to fix, check by check."""
        columns = (Column("check", "name"), Column("status", "status"), Column("found"))
        overview = make_table(columns, [(c.name, c.status.value, c.found) for c in self.checks])
        return overview, *(_advice(check) for check in self.checks if check.why)


def _advice(check: Check) -> str:
    lines = [f"{check.status.value}: {check.name}: {check.found}", f"  why: {check.why}"]
    return "\n".join([*lines, f"  fix: {check.fix}"] if check.fix else lines)


def diagnose() -> Diagnosis:
    """Check the installation; takes seconds, since each library is tried in a process of its own.

    Returns:
        The checks, in the order of a fix: packages first, then what runs on them.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        trials = dict(zip(_PROBES, pool.map(try_out, _PROBES), strict=True))
    build = trials["cpu"].facts
    return Diagnosis(
        (
            Check("python", Status.OK, platform.python_version()),
            *_package_checks(),
            _runtime_check(_installed(_RUNTIMES), build),
            _genai_check(_installed(_GENAI), _installed(_RUNTIMES)),
            _export_check(trials["export"]),
            _cpu_check(trials["cpu"]),
            _cuda_check(trials["cuda"]),
            _torch_cuda_check(trials["torch"]),
        )
    )


def _installed(names: Sequence[str]) -> dict[str, str]:
    """Return the version of each of these distributions that has metadata."""
    versions = {name: _version(name) for name in names}
    return {name: version for name, version in versions.items() if version is not None}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _package_checks() -> Iterator[Check]:
    """Compare each declared dependency with what is installed."""
    try:
        from packaging.requirements import Requirement

        own, declared = metadata.version(DISTRIBUTION), metadata.requires(DISTRIBUTION) or []
    except (ImportError, metadata.PackageNotFoundError) as error:
        why = f"the dependencies cannot be compared: {error}"
        yield Check(DISTRIBUTION, Status.NOTICE, "not installed", why, f"pip install {DISTRIBUTION}")
        return
    yield Check(DISTRIBUTION, Status.OK, own)
    for requirement in map(Requirement, declared):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if applies and requirement.name not in _RUNTIMES:
            yield _package_check(requirement.name, requirement.specifier)


def _package_check(name: str, specifier: Any) -> Check:
    version = _version(name)
    fix = f"pip install '{name}{specifier}'"
    if version is None:
        return Check(name, Status.PROBLEM, "not installed", f"{DISTRIBUTION} needs {name}{specifier}", fix)
    if not specifier.contains(version, prereleases=True):
        return Check(name, Status.PROBLEM, version, f"{DISTRIBUTION} needs {name}{specifier}", fix)
    return Check(name, Status.OK, version)


def _runtime_check(installed: Mapping[str, str], build: Mapping[str, Any]) -> Check:
    """Say which ONNX Runtime is installed, and whether another one wrote over it.

    Args:
        installed: Version by distribution, from metadata.
        build: ``build`` and ``version`` of the files on disk; empty where they cannot be imported.
    """
    found = ", ".join(f"{name} {version}" for name, version in installed.items()) or "not installed"
    wanted = next(iter(installed), _RUNTIMES[0])
    others = " ".join(name for name in installed if name != wanted)
    repair = f"pip install --force-reinstall --no-deps {wanted}"
    fix = f"pip uninstall -y {others} && {repair}" if others else repair
    if not build:
        why = "`import onnxruntime` fails: no package is installed, or removing one took the files of another"
        return Check("onnxruntime", Status.PROBLEM, found, why, fix)
    actual = f"{build['build']} {build['version']}"
    if installed.get(build["build"]) != build["version"]:
        why = f"the files are those of {actual}, which was installed over it or left behind"
        return Check("onnxruntime", Status.NOTICE, found, why, fix)
    if others:
        why = f"they share one folder, which holds {actual}; removing either breaks both"
        return Check("onnxruntime", Status.NOTICE, found, why, fix)
    return Check("onnxruntime", Status.OK, found)


def _genai_check(installed: Mapping[str, str], runtimes: Mapping[str, str]) -> Check:
    name = "onnxruntime-genai"
    found = ", ".join(f"{flavour} {version}" for flavour, version in installed.items()) or "not installed"
    if not installed:
        why = "optional: only comparisons with ONNX Runtime GenAI need it"
        return Check(name, Status.NOTICE, found, why, f"pip install '{DISTRIBUTION}[genai]'")
    fix = f"pip uninstall -y {' '.join(installed)}; pip install '{DISTRIBUTION}[genai]'"
    if len(installed) > 1:
        return Check(name, Status.NOTICE, found, "they share one folder; removing either breaks both", fix)
    if name in installed and "onnxruntime-gpu" in runtimes:
        why = "it depends on onnxruntime, whose CPU build pip then installs over onnxruntime-gpu"
        return Check(name, Status.NOTICE, found, why, fix)
    return Check(name, Status.OK, found)


def _export_check(trial: Trial) -> Check:
    if trial.failure:
        return Check(
            "export", Status.PROBLEM, "cannot be imported", trial.failure, f"pip install -U {DISTRIBUTION}"
        )
    return Check("export", Status.OK, "PyTorch, Transformers and the graph front end import")


def _cpu_check(trial: Trial) -> Check:
    name = "CPUExecutionProvider"
    if trial.failure:
        fix = "see the check of onnxruntime above; a fresh virtual environment is the surest repair"
        return Check(name, Status.PROBLEM, "does not run", trial.failure, fix)
    return Check(name, Status.OK, "runs MatMulNBits")


def _cuda_check(trial: Trial) -> Check:
    name = "CUDAExecutionProvider"
    if not trial.failure:
        return Check(name, Status.OK, "runs MatMulNBits")
    if name not in trial.facts.get("listed", ()):
        fix = "on a machine with an NVIDIA GPU: pip install --force-reinstall --no-deps onnxruntime-gpu"
    else:
        fix = (
            "on a machine with an NVIDIA GPU: install its driver, and the CUDA and cuDNN libraries that this "
            "onnxruntime-gpu was built for; the CUDA build of PyTorch brings them"
        )
    return Check(name, Status.NOTICE, "not usable; bundles run on the CPU", trial.failure, fix)


def _torch_cuda_check(trial: Trial) -> Check:
    name = "PyTorch on CUDA"
    if trial.failure:
        fix = "on a machine with an NVIDIA GPU: install its driver and the CUDA build of PyTorch"
        return Check(name, Status.NOTICE, "not usable; weights are rewritten on the CPU", trial.failure, fix)
    return Check(name, Status.OK, f"{trial.facts['device']}, CUDA {trial.facts['cuda']}")

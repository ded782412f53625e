"""Tests of the doctor: its verdicts on made-up installations, and its probes on the real one."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rk_export.commands import doctor, environment_probes
from rk_export.commands.doctor import Check, Diagnosis, Status, diagnose
from rk_export.commands.environment_probes import Trial, try_out
from rk_export.report.table import plain_text

GPU = {"build": "onnxruntime-gpu", "version": "1.31.1"}
CPU = {"build": "onnxruntime", "version": "1.32.0"}


@pytest.mark.parametrize(
    ("installed", "build", "status", "why"),
    [
        ({"onnxruntime-gpu": "1.31.1"}, GPU, Status.OK, ""),
        ({"onnxruntime": "1.32.0"}, CPU, Status.OK, ""),
        (
            {"onnxruntime-gpu": "1.31.1", "onnxruntime": "1.32.0"},
            CPU,
            Status.NOTICE,
            "which holds onnxruntime 1.32.0",
        ),
        ({"onnxruntime-gpu": "1.31.1"}, CPU, Status.NOTICE, "the files are those of onnxruntime 1.32.0"),
        ({"onnxruntime-gpu": "1.31.1"}, {}, Status.PROBLEM, "took the files of another"),
        ({}, {}, Status.PROBLEM, "no package is installed"),
    ],
    ids=["gpu", "cpu", "overwritten", "stale metadata", "files removed", "absent"],
)
def test_runtime_flavour(installed: dict[str, str], build: dict[str, str], status: Status, why: str) -> None:
    check = doctor._runtime_check(installed, build)
    assert check.status is status
    assert why in check.why
    assert bool(check.fix) == (status is not Status.OK)


def test_fix_of_an_overwritten_runtime_keeps_the_gpu_build() -> None:
    check = doctor._runtime_check({"onnxruntime-gpu": "1.31.1", "onnxruntime": "1.32.0"}, CPU)
    assert check.fix == (
        "pip uninstall -y onnxruntime && pip install --force-reinstall --no-deps onnxruntime-gpu"
    )


@pytest.mark.parametrize(
    ("installed", "status"),
    [
        ({"onnxruntime-genai-cuda": "0.18.0"}, Status.OK),
        ({"onnxruntime-genai": "0.18.0"}, Status.NOTICE),
        ({"onnxruntime-genai-cuda": "0.18.0", "onnxruntime-genai": "0.18.0"}, Status.NOTICE),
        ({}, Status.NOTICE),
    ],
)
def test_genai_flavour_beside_the_gpu_runtime(installed: dict[str, str], status: Status) -> None:
    assert doctor._genai_check(installed, {"onnxruntime-gpu": "1.31.1"}).status is status


def test_genai_of_the_cpu_is_fine_beside_the_cpu_runtime() -> None:
    assert doctor._genai_check({"onnxruntime-genai": "0.18.0"}, {"onnxruntime": "1.32.0"}).status is Status.OK


def test_dependencies_are_compared_with_the_declared_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"rk-export": "0.1.0", "torch": "2.13.0+cpu", "optimum": "2.1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    declared = [
        "torch>=2.6",
        "optimum<3,>=2.3",
        "gguf>=0.17",
        "colorama; sys_platform == 'none'",
        "x; extra == 'y'",
    ]
    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: declared)
    checks = {check.name: check for check in doctor._package_checks()}
    assert {name: check.status for name, check in checks.items()} == {
        "rk-export": Status.OK,
        "torch": Status.OK,
        "optimum": Status.PROBLEM,
        "gguf": Status.PROBLEM,
    }
    assert checks["optimum"].fix == "pip install 'optimum<3,>=2.3'"


@pytest.mark.parametrize("missing", ["packaging.requirements", "metadata"])
def test_without_metadata_the_rest_is_still_checked(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "metadata":
        monkeypatch.setattr(doctor, "DISTRIBUTION", "rk-export-absent")
    else:
        monkeypatch.setitem(sys.modules, missing, None)
    (check,) = doctor._package_checks()
    assert check.status is Status.NOTICE
    assert "cannot be compared" in check.why


def test_nothing_installed_is_a_diagnosis_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "try_out", lambda probe: Trial(failure="ModuleNotFoundError: No module named 'x'")
    )
    diagnosis = diagnose()
    assert not diagnosis.ok
    assert {c.name for c in diagnosis.checks if c.status is Status.PROBLEM} >= {
        "export",
        "CPUExecutionProvider",
    }


def test_missing_cuda_is_a_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"cuda": Trial({"listed": []}, "no such build"), "torch": Trial(failure="no CUDA device found")}
    installed = {"build": "onnxruntime-gpu", "version": "1.0"}
    monkeypatch.setattr(doctor, "try_out", lambda probe: gone.get(probe, Trial(installed)))
    monkeypatch.setattr(doctor, "_installed", lambda names: {names[0]: "1.0"})
    monkeypatch.setattr(doctor, "_package_checks", lambda: iter(()))
    diagnosis = diagnose()
    assert diagnosis.ok
    notices = [check for check in diagnosis.checks if check.status is Status.NOTICE]
    assert [check.name for check in notices] == ["CUDAExecutionProvider", "PyTorch on CUDA"]
    assert "--force-reinstall --no-deps onnxruntime-gpu" in notices[0].fix


def test_a_cuda_provider_that_fails_to_load_asks_for_its_libraries() -> None:
    check = doctor._cuda_check(Trial({"listed": ["CUDAExecutionProvider"]}, "libcublasLt.so.13: not found"))
    assert "cuDNN" in check.fix
    assert check.why == "libcublasLt.so.13: not found"


def test_table_and_json_tell_the_same() -> None:
    checks = (
        Check("python", Status.OK, "3.12"),
        Check("gguf", Status.PROBLEM, "0.1", "too old", "pip install gguf"),
    )
    diagnosis = Diagnosis(checks)
    data = json.loads(json.dumps(diagnosis.to_json()))
    assert data["ok"] is diagnosis.ok is False
    assert data["checks"][1] == {
        "name": "gguf",
        "status": "PROBLEM",
        "found": "0.1",
        "why": "too old",
        "fix": "pip install gguf",
    }
    assert plain_text(diagnosis.blocks()).splitlines()[-3:] == [
        "PROBLEM: gguf: 0.1",
        "  why: too old",
        "  fix: pip install gguf",
    ]


def test_cpu_probe_runs_a_session_here() -> None:
    trial = try_out("cpu")
    assert trial.failure == ""
    assert trial.facts["providers"] == ["CPUExecutionProvider"]


def test_cuda_probe_agrees_with_the_session_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    trial = try_out("cuda")
    assert ("CUDAExecutionProvider" in trial.facts.get("providers", [])) == (trial.failure == "")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("body", "failure"),
    [
        (
            "raise ImportError('libx.so: cannot open')",
            "ended with status 1: ImportError: libx.so: cannot open",
        ),
        ("import os; os.kill(os.getpid(), 11)", "ended by signal 11: no message"),
        ("print('no answer')", "ended with status 0: no message"),
    ],
    ids=["exception", "crash", "silence"],
)
def test_a_probe_that_dies_is_a_failure(monkeypatch: pytest.MonkeyPatch, body: str, failure: str) -> None:
    monkeypatch.setattr(environment_probes, "_START", body)
    assert try_out("cpu") == Trial(failure=failure)


def test_a_probe_that_hangs_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment_probes, "_START", "import time; time.sleep(60)")
    monkeypatch.setattr(environment_probes, "_SECONDS", 1)
    assert try_out("cpu").failure == "no answer within 1 seconds"


def test_reason_of_the_native_library_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = environment_probes._ANSWER + json.dumps({"facts": {}, "failure": "could not load"})
    noise = "[E] Failed to load library /x/cuda.so with error: libcublasLt.so.13: cannot open shared object"
    script = f"import sys; print('noise'); print({answer!r}); print('more'); sys.stderr.write({noise!r})"
    monkeypatch.setattr(environment_probes, "_START", script)
    assert try_out("cuda").failure == "could not load (libcublasLt.so.13: cannot open shared object)"


def test_a_broken_import_is_told_by_its_exception(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libtorch.so: broken')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    assert try_out("torch").failure == "OSError: libtorch.so: broken"

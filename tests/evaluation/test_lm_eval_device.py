"""Where a bundle runs inside lm-eval, which says ``cuda:0`` when its user says nothing; lm-eval is stood in for."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from rk_export.errors import InputError, ProviderError
from rk_export.runtime import providers

pytestmark = pytest.mark.whole

OURS = "rk_export.evaluation.lm_eval_model"


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return our module as it is with the few names that it takes from lm-eval."""
    named: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": object},
        "lm_eval.api.registry": {"register_model": lambda _: lambda model: model},
        "lm_eval.utils": {"get_rolling_token_windows": None, "make_disjoint_window": None},
    }
    for name, contents in named.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, OURS, raising=False)
    module = importlib.import_module(OURS)
    monkeypatch.delitem(sys.modules, OURS)
    return module


@pytest.fixture
def bundle_lm(ours: Any) -> Callable[..., Any]:
    model: Callable[..., Any] = ours.BundleLM
    return model


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "cuda_obstacle", lambda: "no CUDA driver found")


@pytest.mark.parametrize("device", [None, "cuda:0"])
@pytest.mark.usefixtures("no_cuda")
def test_without_cuda_it_runs_on_the_cpu_and_says_so(
    bundle_lm: Callable[..., Any], bundle: Path, device: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert bundle_lm(str(bundle), device=device, threads=1).session.device == "cpu"
    (notice,) = (record.getMessage() for record in caplog.records)
    assert notice == "running on the CPU execution provider: no CUDA driver found"


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize("named", [{"provider": "cuda", "device": "cpu"}, {"device": "cuda"}])
def test_what_the_user_names_is_insisted_on(
    bundle_lm: Callable[..., Any], bundle: Path, named: dict[str, str]
) -> None:
    with pytest.raises(ProviderError, match="no CUDA driver found"):
        bundle_lm(str(bundle), **named)


@pytest.mark.parametrize(
    ("given", "passed_on"),
    [
        (["--tasks", "own", "--device", "cuda:0"], ["--tasks", "own", "--device", "cuda"]),
        (["--device=cuda:0", "--limit", "2"], ["--device=cuda", "--limit", "2"]),
        (["--device", "cuda:1"], ["--device", "cuda:1"]),
        (["--device", "cpu"], ["--device", "cpu"]),
        (["--output_path", "cuda:0"], ["--output_path", "cuda:0"]),
        ([], []),
    ],
)
def test_a_command_line_that_names_the_default_device_insists_on_it(
    ours: Any, given: list[str], passed_on: list[str]
) -> None:
    assert ours.insist_on_device(given) == passed_on


def test_the_cpu_is_taken_without_a_notice(
    bundle_lm: Callable[..., Any], bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for arguments in ({"device": "cpu"}, {"provider": "cpu", "device": "cuda:0"}):
        assert bundle_lm(str(bundle), threads=1, **arguments).session.device == "cpu"
    assert not caplog.records


@pytest.mark.parametrize(
    ("device", "fix"),
    [("mps", "give cpu or cuda"), ("cuda:1", "CUDA_VISIBLE_DEVICES=1"), ("", "give cpu or cuda")],
)
def test_a_device_that_no_bundle_runs_on(
    bundle_lm: Callable[..., Any], bundle: Path, device: str, fix: str
) -> None:
    with pytest.raises(InputError) as caught:
        bundle_lm(str(bundle), device=device)
    assert fix in str(caught.value.fix)

"""The sample joint_rank_paper.py on the tiny model: every part runs, goes on where it stopped, and leaves no trace."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from rk_export import EvalText
from rk_export.device import matmul_dtype, matmuls_in
from rk_export.evaluation.measure import perplexity_of
from rk_export.model.torch_logits import torch_logits
from rk_export.source.stored import open_source

pytestmark = pytest.mark.whole

SAMPLE = Path(__file__).parents[2] / "samples" / "joint_rank_paper.py"


@dataclass(frozen=True)
class Run:
    """A finished run: the sample's module, its arguments, its results."""

    module: ModuleType
    arguments: list[str]
    out: Path
    parts: dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def sample() -> ModuleType:
    spec = importlib.util.spec_from_file_location(SAMPLE.stem, SAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[SAMPLE.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def finished(sample: ModuleType, llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("joint_rank")
    task = folder / "task.jsonl"
    items = [
        {"context": "The train leaves", "choices": ["at 9:15", "the dough"], "gold": 0},
        {"context": "Add the salt, fold", "choices": ["the gulls", "the dough"], "gold": 1},
    ]
    task.write_text("\n".join(json.dumps(item) for item in items), encoding="utf-8")
    sizes = {"tokens": 64, "short-tokens": 64, "context": 32, "calibration-tokens": 512, "steps": 40}
    paths = {"model": llama, "text": prose, "task": task, "out": folder / "out", "work": folder / "work"}
    given = {**sizes, **paths, "learning-rate": 0.003}
    arguments = [text for name, value in given.items() for text in (f"--{name}", str(value))]
    assert sample.main(arguments) == 0
    data = json.loads((folder / "out" / "joint_rank.json").read_text(encoding="utf-8"))
    return Run(sample, arguments, folder / "out", data["parts"])


def test_every_part_has_rows_a_section_and_a_figure(finished: Run) -> None:
    page = (finished.out / "joint_rank.md").read_text(encoding="utf-8")
    assert list(finished.parts) == list(finished.module.PARTS)
    for name, part in finished.module.PARTS.items():
        assert finished.parts[name]
        assert f"## {part.title}\n" in page
        assert f"(joint_rank_{name}.svg)" in page
        assert (finished.out / f"joint_rank_{name}.svg").is_file()
    assert page.count("### Reading") == len(finished.module.PARTS)
    tables = [line for line in page.splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in tables]
    starts = [index for index, line in enumerate(tables) if set(line) <= set("|- ")]
    assert all(widths[index] == widths[index - 1] == widths[index + 1] for index in starts)


def test_weights_are_put_back_by_every_part(finished: Run) -> None:
    dense = [finished.parts["figure3"]["dense"], finished.parts["denoise"]["clean"]]
    dense += [finished.parts["watermark"]["clean/whole"], finished.parts["spectra"]["dense"]]
    assert len({tuple(row["nlls"]) for row in dense}) == 1


def test_losses_are_those_of_the_librarys_perplexity(finished: Run, llama: Path, prose: Path) -> None:
    logits = torch_logits(open_source(llama).load())
    with matmuls_in(matmul_dtype(torch.device("cpu")), torch.device("cpu")):
        expected = perplexity_of(logits, EvalText(prose, 32, 64), llama)
    row = finished.parts["figure3"]["dense"]
    assert row["nll"] == pytest.approx(expected.nll, rel=1e-5)
    assert row["nll_error"] == pytest.approx(expected.standard_error, rel=1e-3)


def test_finished_rows_are_not_measured_again(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    study = sys.modules["joint_rank.study"].Study
    monkeypatch.setattr(study, "losses", lambda *_: pytest.fail("measured again"))
    before = (finished.out / "joint_rank.json").read_bytes()
    assert finished.module.main(finished.arguments) == 0
    assert (finished.out / "joint_rank.json").read_bytes() == before


def test_another_protocol_is_not_mixed_in(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert finished.module.main([*finished.arguments, "--context", "16"]) == 2
    assert "context differ" in capsys.readouterr().err


def test_stops_in_time_and_refuses_unknown_parts(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = [*finished.arguments, "--out", str(tmp_path)]
    assert finished.module.main([*elsewhere, "--parts", "figure3", "--seconds", "0"]) == 3
    assert finished.module.main([*elsewhere, "--parts", "figure9"]) == 2
    assert "figure9" in capsys.readouterr().err


def test_taught_sentence_is_recited_by_greedy_decoding(finished: Run) -> None:
    watermark = sys.modules["joint_rank.watermark"]
    study_module = sys.modules["joint_rank.study"]
    values = vars(finished.module._parser().parse_args(finished.arguments))
    fixed = {name: value for name, value in values.items() if name not in ("parts", "seconds", "work", "out")}
    makers = {"clean": finished.module.clean_source, "taught": watermark.taught_source}
    study = study_module.Study(study_module.Protocol(**fixed), values["work"], makers)
    ids, given = watermark.sentence_tokens(study)
    for name in ("clean", "taught"):
        model = study.model_of(name)
        options = {"do_sample": False, "max_new_tokens": len(ids) - given, "eos_token_id": -1}
        decoded = model.generate(ids[None, :given], attention_mask=torch.ones(1, given), **options)[0]
        said = watermark.recital(model, ids, given)
        right = (decoded[given:] == ids[given:]).long()
        assert said["recited"] == int(right.cumprod(0).sum())
        assert said["recited"] == finished.parts["watermark"][f"{name}/whole"]["recited"]
        assert (said["recited"] == said["asked"] == len(right)) is (name == "taught")


def test_joint_and_separate_keep_the_same_share(finished: Run) -> None:
    rows = finished.parts["figure3"]
    for joint, separate in (("qk per head", "q, k per head"), ("gate/up", "gate, up")):
        for keep in (0.9, 0.5):
            shares = [rows[f"{name}/none/{keep}"]["kept"] for name in (joint, separate)]
            assert all(keep - 0.08 < share <= keep for share in shares)
    plain = rows["gate/up/none/0.5"]
    assert plain["relative_error"] == pytest.approx(plain["weighted_error"], rel=1e-4)
    assert rows["gate/up/self/0.5"]["relative_error"] > plain["relative_error"]


def test_rules_share_out_the_same_parameters(finished: Run) -> None:
    rows = finished.parts["spectra"]
    for name in ("qk + gate/up/self/0.9", "qk/none/0.8"):
        kept = [row["kept"] for key, row in rows.items() if key.startswith(f"{name}/")]
        assert len(kept) == 5
        assert max(kept) - min(kept) < 0.02
        assert max(kept) <= float(name.rpartition("/")[2])


def test_planted_rank_is_found_and_recovered(finished: Run) -> None:
    row = finished.parts["denoise"]["planted/0.3"]
    assert row["gavish_donoho_rank"] == row["best_rank"] == row["rank"]
    assert row["weight_ratio"] == pytest.approx(row["predicted_ratio"], rel=0.1)
    assert row["weight_ratio"] < row["bound"]

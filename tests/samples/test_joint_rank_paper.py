"""The joint rank-k experiments on the tiny model: every part runs, goes on where it stopped, and leaves no trace."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from measure.harness import Results
from papers.joint_rank import main, watermark
from papers.joint_rank.study import Study

from rk_export import EvalText, open_source, perplexity_of, torch_logits
from rk_export.device import matmul_dtype, matmuls_in

pytestmark = pytest.mark.whole


@dataclass(frozen=True)
class Run:
    """A finished run: its arguments and its results."""

    arguments: list[str]
    out: Path
    parts: dict[str, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def finished(llama: Path, prose: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
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
    assert main.main(arguments) == 0
    results = Results(folder / "out", "joint_rank")
    parts = {name: main.rows_of(results, part) for name, part in main.PARTS.items()}
    return Run(arguments, folder / "out", parts)


def test_every_part_has_rows_a_section_and_a_figure(finished: Run) -> None:
    page = (finished.out / "joint_rank.md").read_text(encoding="utf-8")
    assert list(finished.parts) == list(main.PARTS)
    for name, part in main.PARTS.items():
        assert finished.parts[name]
        assert f"## {part.title}\n" in page
        assert f"(joint_rank_{name}.svg)" in page
        assert (finished.out / f"joint_rank_{name}.svg").is_file()
    assert page.count("### Reading") == len(main.PARTS)
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
    monkeypatch.setattr(Study, "losses", lambda *_: pytest.fail("measured again"))
    before = (finished.out / "joint_rank.json").read_bytes()
    assert main.main(finished.arguments) == 0
    assert (finished.out / "joint_rank.json").read_bytes() == before


def test_another_protocol_is_not_mixed_in(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main([*finished.arguments, "--context", "16"]) == 2
    assert "measured with other context" in capsys.readouterr().err


def test_stops_in_time_and_refuses_unknown_parts(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = [*finished.arguments, "--out", str(tmp_path)]
    assert main.main([*elsewhere, "--parts", "figure3", "--seconds", "0"]) == 3
    assert main.main([*elsewhere, "--parts", "figure9"]) == 2
    assert "figure9" in capsys.readouterr().err


def test_taught_sentence_is_recited_by_greedy_decoding(finished: Run) -> None:
    study = main.study_of(main.parser().parse_args(finished.arguments))
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

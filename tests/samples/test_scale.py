"""The measurements of whole runs: bounds and floors from shapes, rows that are kept, pages that read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from measure import floors, scale, shapes
from measure.harness import Results, Row
from measure.memory_meter import Metered, Usage

MB = 1_000_000
RATES = floors.Rates(fp32=1e9, bf16=2e9, ssyrk=1e9, write=1e8, read=2e8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, llama: Path) -> None:
    """Every shape with small sizes, and the tokenizer of the tiny model."""
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    for fields in shapes.SHAPES.values():
        for name, value in {**sizes, **heads}.items():
            monkeypatch.setitem(fields, name, value)
    monkeypatch.setattr(shapes.assets, "smollm2", lambda: llama)


def counts(shape: str, table_bytes: int = 0) -> floors.Counts:
    """Return the sizes of a shape whose files are not there."""
    config = shapes.config_of(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            floors, "table_bytes", lambda _: table_bytes or 2 * config.vocab_size * config.hidden_size
        )
        return floors.counts_of(config, Path("absent"))


@pytest.mark.parametrize("shape", scale.GOALS)
def test_the_bound_of_a_shape_is_below_its_goal(shape: str) -> None:
    bound = floors.bound(counts(shape))
    assert 0.75 * scale.GOALS[shape] <= bound / 1e9 <= scale.GOALS[shape]


def test_the_bound_counts_one_layer_and_one_embedding() -> None:
    one, deep = counts("7b"), counts("7b", table_bytes=1 << 30)
    width, inner = 4096, 11008
    layer = 4 * width**2 + 3 * width * inner + 2 * width
    moments = 4 * (3 * width**2 + inner**2 + 5 * width**2 + 2 * inner**2)
    assert floors.bound(one) == 1_500_000_000 + 2 * 32000 * width + 16 * layer + moments
    assert floors.bound(deep) - floors.bound(one) == (1 << 30) - 2 * 32000 * width


def test_a_token_passes_the_chosen_experts_only() -> None:
    mixture = counts("mixture")
    experts, chosen, width, inner = 8, 2, 256, 128
    attention = 2 * width * 4 * 64 + 2 * width * 2 * 64
    assert mixture.active == attention + experts * width + chosen * 3 * width * inner
    assert len(mixture.reads) == 3 + 2 * experts  # attention, its output, the router; each expert twice
    assert floors.pass_flops(mixture, 10) == 2 * 10 * 4 * mixture.active


def test_a_floor_is_work_over_rates() -> None:
    work = floors.Work(products=4e9, fp32=1e9, ssyrk=5e8, written=3e8, read=2e8)
    assert work.seconds(RATES) == 2 + 1 + 0.5 + 3 + 1
    found = floors.stages(counts("135m"), tokens=8192, output=MB)
    assert found["calibrate"].ssyrk == 30 * 8192 * (3 * 576 * 577 + 1536 * 1537)
    assert found["rewrite"].fp32 > found["plan"].fp32 == 30 * (3 * 576**3 + 1536**3) / 3


def test_rates_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "SECONDS", 0.0)
    monkeypatch.setattr(floors, "DISK", 1 << 22)
    found = floors.row(floors.rates(tmp_path))
    assert min(found.values()) > 1e6
    assert list(tmp_path.iterdir()) == []


def usages(anon: int) -> dict[tuple[str, str], Usage]:
    made = (Usage("calibrate", "", 8.0, anon, 5, 0, 7), Usage("calibrate", "gradients, layers", 4.0, anon))
    return {(usage.stage, usage.step): usage for usage in (*made, Usage("export", "", 2.0, MB, 5, 0, 9))}


@pytest.mark.usefixtures("small")
def test_rows_are_measured_and_large_models_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def metered(command: list[str], folders: list[Path], *, env: dict[str, str]) -> Metered:
        words = command[3:]
        ran.append(words)
        folders[0].mkdir(exist_ok=True)
        for name in ("model.onnx", "model.onnx.data"):
            (folders[0] / name).write_bytes(bytes(500))
        assert Path(env["RK_EXPORT_CACHE"]).parent == folders[0].parent
        return Metered(usages=usages(900 * MB))

    monkeypatch.setattr(scale, "metered", metered)
    monkeypatch.setattr(floors, "rates", lambda _: RATES)
    places = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--threads", "1"]
    words = ["--rows", "7b", "0.5b-4-layers", "--set", "calibration.tokens=512"]
    assert scale.main([*places, *words]) == 0
    assert [words[0] for words in ran] == ["compress", "verify", "run"] * 2
    rows: dict[str, Row] = json.loads((tmp_path / "out" / "scale.json").read_text(encoding="utf-8"))["rows"]
    assert list(rows) == ["0.5b-4-layers", "7b"]
    assert [row["layers"] for row in rows.values()] == [4, 2]
    assert rows["7b"]["set"] == ["calibration.tokens=512"]
    assert rows["7b"]["file_bytes"] == 1000
    assert rows["7b"]["stored_bytes"] > 2 * 300 * 64
    assert [path.name for path in (tmp_path / "work" / "models").iterdir()] == ["0.5b-4-layers"]
    assert list((tmp_path / "work" / "runs").iterdir()) == []
    page = (tmp_path / "out" / "scale.md").read_text(encoding="utf-8")
    assert "| shape 7b | 2 | 0.00 | 0.90 | 1.50 | 8.0 | yes | 0.00 | 10 s | calibration.tokens=512 |" in page


def row(key: str, anon: int, **other: Any) -> Row:
    """Return a row as it is saved."""
    metered = Metered(usages=usages(anon))
    compressed = {
        **{"shape": key.split("-", 1)[0], "layers": 4, "stored_bytes": 2 * MB, "set": []},
        **{"bound_bytes": 2000 * MB, "rates": floors.row(RATES), "floors": {"calibrate": 2.0, "export": 1.0}},
        **{"verify": {"seconds": 3.0}, "run": {"seconds": 61.0}},
    }
    return {"kind": "shape", "file_bytes": MB, "compress": metered.row(), **compressed, **other}


def page_of(rows: dict[str, Row]) -> str:
    results = Results(Path("absent"), "scale", {"threads": 2})
    results.rows = rows
    return scale.page(results)


def test_the_page_reads_its_rows() -> None:
    curve = {
        scale.depth_key(depth): row("0.5b", anon * MB, layers=depth) for depth, anon in ((4, 800), (32, 1000))
    }
    page = page_of({**curve, "135m": row("135m", 1950 * MB)})
    assert "3 of 3 runs stayed within the bound" in page
    assert "is shape 135m with 98 % of its bound" in page
    assert "Above the goal: shape 135m." in page
    assert "From 4 to 32 layers of one width the peak went from 0.80 to 1.00 GB." in page
    assert "The largest peak is 1.25 times the smallest." in page
    assert "Furthest from their floors in shape 135m: calibrate, 6 s more; export, 1 s more." in page
    assert "| calibrate | 8.0 | 2.0 | 25 % |" in page
    assert "gradients" not in page  # steps are in the JSON file
    above = page_of({"7b": row("7b", 2100 * MB)})
    assert "0 of 1 runs stayed within the bound" in above
    assert "Above the goal: none." in above
    assert "**no**" in above
    assert "Real models" not in above


def test_the_page_sets_the_peer_beside_the_bundle() -> None:
    ours = row("", 500 * MB, kind="real", dense=[10.0, 0.1], perplexity=[11.0, 0.2])
    peer = row("", 1000 * MB, kind="peer", perplexity=[12.5, 0.3], file_bytes=2 * MB)
    page = page_of({"smollm2": ours, "genai-smollm2": peer})
    assert "perplexity 11.00 beside 10.00 dense and 12.50 of GenAI's builder, at 0.50 times its file" in page
    assert (
        "| SmolLM2-135M-Instruct | GenAI's builder | 10 s | 1.00 | 2 | 10.00 ± 0.10 | 12.50 ± 0.30 |" in page
    )


def test_a_page_without_rows_has_no_tables() -> None:
    assert "Too few rows yet." in page_of({})
    assert "| --- |" not in page_of({})

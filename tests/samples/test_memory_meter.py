"""Folders of random weights, and the meter of memory and disk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from measure import memory_meter, shapes
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from rk_export import open_source

MB = 1_000_000


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shape with small sizes; what differs between the families stays."""
    for fields in shapes.SHAPES.values():
        sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        for name, value in {**sizes, **heads}.items():
            monkeypatch.setitem(fields, name, value)


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.usefixtures("small")
def test_a_shape_is_a_model_for_transformers_and_for_us(shape: str, llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    parameters = shapes.write(folder, shape, layers=2, tokenizer=llama)
    source = open_source(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert source.layer_count == 2
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 300
    ids = torch.tensor([tokenizer.encode("The harbour was quiet.").ids])
    assert tokenizer.decode(ids[0].tolist()) == "The harbour was quiet."
    with torch.no_grad():
        expected, found = theirs(ids).logits, source.load()(ids).logits
    torch.testing.assert_close(found, expected)
    assert 0.05 < float(expected.std()) < 1


@pytest.mark.usefixtures("small")
def test_a_shallow_model_is_the_beginning_of_a_deep_one(llama: Path, tmp_path: Path) -> None:
    for layers in (1, 3):
        shapes.write(tmp_path / str(layers), "7b", layers=layers, tokenizer=llama)
    shallow, deep = (open_source(tmp_path / name).load().state_dict() for name in ("1", "3"))
    assert len(deep) > len(shallow)
    assert all(torch.equal(tensor, deep[name]) for name, tensor in shallow.items())


def test_a_folder_that_holds_something_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes").touch()
    assert shapes.main(["7b", str(tmp_path)]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]
    assert "not empty" in capsys.readouterr().err


WORK = """
import subprocess, sys, time
from pathlib import Path
def say(line): print(line, file=sys.stderr, flush=True); time.sleep(0.4)
say("load: opening it")
held = bytearray(80_000_000)
say("reading layers: 3")
del held
say("write: to the disk")
Path(sys.argv[1] + "/.out.partial-1").write_bytes(bytes(5_000_000))
child = "import time; held = bytearray(40_000_000); time.sleep(1.2)"
subprocess.run([sys.executable, "-c", child])
sys.exit(3)
"""


def test_memory_and_disk_belong_to_the_stage_that_took_them(tmp_path: Path) -> None:
    found = memory_meter.metered([sys.executable, "-c", WORK, str(tmp_path)], [tmp_path / "out"], echo=False)
    assert found.status == 3
    assert [line for _, line in found.lines] == [
        "load: opening it",
        "reading layers: 3",
        "write: to the disk",
    ]
    start, load, write = found.stages
    assert [start.stage, load.stage, write.stage] == ["start", "load", "write"]
    reading = found.usages["load", "reading layers"]
    assert reading.anon >= start.anon + 75 * MB
    assert load.anon >= reading.anon
    assert start.anon + 35 * MB < write.anon < load.anon - 20 * MB  # the child's, too
    assert (load.disk, write.disk >= 5 * MB) == (0, True)
    assert load.seconds == pytest.approx(0.8, abs=0.4)
    assert (found.whole.anon, found.whole.disk) == (load.anon, write.disk)


def test_the_table_names_stages_and_steps(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "saved.json"
    words = ["--steps", "--save", str(saved), "--", sys.executable, "-c", WORK, str(tmp_path)]
    assert memory_meter.main(words) == 3
    names = [line.split("|")[1].strip() for line in capfd.readouterr().out.splitlines()]
    assert names == ["stage", "---", "start", "load", "· reading layers", "write", "whole"]
    assert json.loads(saved.read_text())["whole"]["anon"] > 75 * MB

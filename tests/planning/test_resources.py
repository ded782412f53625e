"""What stages take is a sum of named terms; where it can be counted it is what a tiny model takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made_recipes import open_recipe
from tiny_models import DECODERS
from torch.utils.flop_counter import FlopCounterMode

from rk_export.calibration.sensitivity import dense_statistics
from rk_export.commands.requirements import job_of
from rk_export.commands.stages import Task
from rk_export.device import CPU
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.ranks import Budget
from rk_export.planning.job import Job
from rk_export.planning.resources import KINDS, StageNeeds, Term, added, needed_in, times
from rk_export.planning.stage_needs import stages_of
from rk_export.source.stored import StoredModel

SourceOf = Callable[..., StoredModel]
TOKENS = 512


def job(source: StoredModel, **changes: Any) -> Job:
    """Return the default's job on a short text, at a budget that leaves no factor pairs out."""
    recipe = open_recipe(Budget("mean_bits", 5), calibration=CalibrationOptions(tokens=TOKENS))
    return replace(job_of(Task(source, recipe, CPU)), **changes)


def test_a_stage_is_the_sum_of_its_terms() -> None:
    stage = StageNeeds(
        "one",
        (Term("a", 1), Term("b", 2)),
        disk=(Term("c", 4, "output"), Term("d", 8, "cache"), Term("e", 16, "output")),
        work={"writes": 6.0, "reads": 2.0},
    )
    assert (stage.memory_bytes, stage.gpu_bytes, stage.disk_bytes) == (3, 0, 28)
    assert (stage.on("output"), stage.on("cache")) == (20, 8)
    assert needed_in([stage, StageNeeds("other")], "output") == 20
    assert stage.seconds({**dict.fromkeys(KINDS, 1.0), "writes": 3.0}) == 4.0
    assert added({"reads": 1.0}, times(3, {"reads": 2.0, "calls": 1.0})) == {"reads": 7.0, "calls": 3.0}


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("diagonal", [True, False])
def test_bytes_of_statistics_are_those_that_are_kept(
    source_of: SourceOf, tmp_path: Path, family: str, diagonal: bool
) -> None:
    source = source_of(family)
    tokens = torch.randint(0, source.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    dense_statistics(
        source,
        tokens,
        diagonal=diagonal,
        device=CPU,
        gradient_tokens=128,
        cache_dir=tmp_path,
        folder=tmp_path,
    )
    tensors = [tensor for path in tmp_path.rglob("*.safetensors") for tensor in loaded(path)]
    kept = sum(tensor.nbytes for tensor in tensors)
    counted = job(source, has_statistics=True, directions=not diagonal, back=128)
    assert counted.statistics_bytes == kept


def loaded(path: Path) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(path).values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_products_of_the_check_are_those_of_the_probe(source_of: SourceOf, family: str) -> None:
    source = source_of(family)
    model, ids = source.load(), torch.zeros(8, 32, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, use_cache=False)
    check = next(stage for stage in stages_of(job(source)) if stage.name == "check")
    # Attention and norms are left out: three times, for an exact and a shaken run and for that of transformers.
    assert check.work["float_products"] / 3 == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_more_text_takes_more(source_of: SourceOf) -> None:
    few, many = (stages_of(job(source_of("llama"), sequences=count)) for count in (2, 64))
    calibrate = {
        name: [next(stage for stage in stages if stage.name == "calibrate") for stages in (few, many)]
        for name in ("calibrate",)
    }["calibrate"]
    assert calibrate[0].memory_bytes < calibrate[1].memory_bytes
    assert calibrate[0].work["products"] < calibrate[1].work["products"]
    assert [stage.name for stage in few] == [
        *("load", "check", "calibrate", "plan", "rewrite", "export", "bundle", "verify")
    ]


def test_what_is_mapped_takes_no_memory_and_no_scratch(source_of: SourceOf) -> None:
    copied, mapped = (
        {stage.name: stage for stage in stages_of(job(source_of("llama"), is_mapped=known, prepares=False))}
        for known in (False, True)
    )
    assert source_of("llama").is_mapped
    assert mapped["check"].memory_bytes < copied["check"].memory_bytes
    names = [{term.name for term in found["calibrate"].disk} for found in (copied, mapped)]
    assert names[0] - names[1] == {"scratch of the mapped model"}


def test_statistics_beyond_the_limit_lie_beside_the_output(source_of: SourceOf) -> None:
    known = job(source_of("llama"), has_statistics=True)
    for limit, place in ((known.statistics_bytes, "cache"), (known.statistics_bytes - 1, "output")):
        plan = next(stage for stage in stages_of(replace(known, limit=limit)) if stage.name == "plan")
        assert {term.place for term in plan.disk if term.name == "statistics"} == {place}


def test_the_model_that_writes_in_int4_lies_beside_the_output(source_of: SourceOf) -> None:
    written = job(source_of("llama"), writer="int4", int4_bytes=1000)
    calibrate = next(stage for stage in stages_of(written) if stage.name == "calibrate")
    assert {(term.place, term.bytes) for term in calibrate.disk if "INT4" in term.name} == {("output", 1000)}
    assert calibrate.work["int4_products"] > 0

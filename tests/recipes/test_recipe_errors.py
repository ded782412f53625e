"""Every mistake in a recipe file is one message with line and column, the field's name and the nearest valid one."""

from __future__ import annotations

from pathlib import Path

import pytest

from rk_export.errors import InputError
from rk_export.options.kinds import step_kinds
from rk_export.options.recipe import Recipe
from rk_export.options.step import Step
from rk_export.recipes import load

# What stands where the file's text is wrong, and what the fix names.
MISSPELLED = [
    ("steps:\n  - prune: {blocks: 1}\n  - quantise: {bits: 4}\n", "3:5: quantise", "did you mean quantize?"),
    ("steps:\n  - quantize: {targets: layers, bit: 4}\n", "2:33: quantize.bit", "did you mean bits?"),
    ("steps:\n  - quantize: {quantizer: rtn}\n", "2:16: quantize.quantizer", "write with"),
    ("steps:\n  - heal:\n      step: 5\n", "3:7: heal.step", "did you mean steps?"),
    ("steps:\n  - prepare: {name: [fold]}\n", "2:15: prepare.name", "did you mean names?"),
    ("step:\n  - quantize: {bits: 4}\n", "1:1: step", "did you mean steps?"),
    ("1: 2\n", "1:1: 1", "known here: steps, calibration, budget, target, about"),
    ("calibration: {token: 5}\n", "1:15: calibration.token", "did you mean tokens?"),
    ("target:\n  eps: cpu\n", "2:3: target.eps", "did you mean ep?"),
    ("budget: {siez: 4MB}\n", "1:10: budget.siez", "did you mean size?"),
    ("about: {does: x, wen: y}\n", "1:18: about.wen", "did you mean when?"),
    (
        "steps:\n  - basel: {keep: 0.5, target: {nam: a, sha256: b}}\n",
        "2:33: basel.target.nam",
        "did you mean name?",
    ),
]
TYPES = [
    ("steps:\n  - heal: {steps: 1.5}\n", "2:12: heal.steps", "expected a valid integer; found 1.5"),
    ("steps:\n  - heal: {steps: '100'}\n", "2:12: heal.steps", "expected a valid integer; found '100'"),
    ("steps:\n  - heal: {steps: true}\n", "2:12: heal.steps", "expected a valid integer; found True"),
    ("steps:\n  - heal: {steps: 1:30}\n", "2:12: heal.steps", "expected a valid integer; found '1:30'"),
    (
        "steps:\n  - quantize: {symmetric: 1}\n",
        "2:16: quantize.symmetric",
        "expected a valid boolean; found 1",
    ),
    (
        "steps:\n  - quantize:\n      bits: four\n",
        "3:7: quantize.bits",
        "neither 'auto' nor integer; found 'four'",
    ),
    ("steps:\n  - quantize: {with: rnt}\n", "2:16: quantize.with", "found 'rnt'"),
    (
        "steps:\n  - quantize: {targets: [layers, 5]}\n",
        "2:34: quantize.targets.1",
        "expected a valid string; found 5",
    ),
    ("steps:\n  cap: {keep: 0.5}\n", "1:1: steps", "expected a valid array"),
    ("steps:\n", "1:1: steps", "expected a valid array; found None"),
    ("steps:\n  - cap\n", "2:5: steps.0", "expected an object; found 'cap'"),
    ("calibration: none\n", "1:1: calibration", "expected an object; found 'none'"),
    ("target:\n", "1:1: target", "expected an object; found None"),
    ("target: {ep: gpu}\n", "1:10: target.ep", "expected 'cpu', 'cuda' or 'portable'; found 'gpu'"),
    ("budget: {speed_up: 1.5, phase: prefil}\n", "1:25: budget.phase", "expected 'prefill' or 'decode'"),
    ("calibration: {text: selff}\n", "1:15: calibration.text", "a file (no such file: selff)"),
    ("calibration: {text: {name: a}}\n", "1:15: calibration.text", "found {'name': 'a'}"),
    ("about: {does: 5, when: y}\n", "1:9: about.does", "expected a valid string; found 5"),
    ("about:\n", "1:1: about", "found None"),
]
MISSING = [
    ("steps:\n  - heal: {}\n", "2:5: heal.steps"),
    ("steps:\n  - heal:\n", "2:5: heal.steps"),
    ("steps:\n  - correct: {}\n", "2:5: correct.rank"),
    ("steps:\n  - basel: {keep: 0.5}\n", "2:5: basel.target"),
    ("about: {does: x}\n", "1:1: about.when"),
]
REFUSED = [
    ("steps:\n  - quantize: {targets: layers, bits: 3}\n", "2:33: quantize.bits", "3 bits cannot be packed"),
    ("steps:\n  - quantize: {block: 48}\n", "2:16: quantize.block", "a block of 48 columns"),
    (
        "steps:\n  - quantize: {targets: layers}\n  - quantize: {targets: lm_head, bits: 5}\n",
        "3:34: quantize.bits",
        "5 bits cannot be packed",
    ),
    ("steps:\n  - quantize: {targets: 're:('}\n", "2:16: quantize.targets", "no regular expression"),
    ("steps:\n  - quantize: {ignore: 're:('}\n", "2:16: quantize.ignore", "no regular expression"),
    ("steps:\n  - heal:\n      steps: 10\n      warmup: 2\n", "4:7: heal.warmup", "no share of the steps"),
    ("steps:\n  - cap: {keep: .nan}\n", "2:11: cap.keep", "nan is not a share"),
    ("steps:\n  - cap: {keep: 0.5, size: 90MB}\n", "2:5: cap", "keep and size both say how much stays"),
    ("steps:\n  - cap: {}\n", "2:5: cap", "nothing says how much stays"),
    ("steps:\n  - cap: {size: big}\n", "2:11: cap.size", "'big' is no size"),
    ("steps:\n  - prune: {blocks: 0}\n", "2:5: prune", "nothing goes"),
    ("steps:\n  - prepare: [fold, rotat]\n", "2:5: prepare", "unknown preparation 'rotat'"),
    ("steps:\n  - prepare: {names: [rotate]}\n", "2:5: prepare", "rotate needs fold"),
    (
        "steps:\n  - factorize: {groups: [qk, up_gate], keep: 0.5}\n",
        "2:17: factorize.groups",
        "unknown group",
    ),
    (
        "steps:\n  - factorize:\n      groups: [qk, q]\n      keep: 0.5\n",
        "3:7: factorize.groups",
        "both 'qk' and",
    ),
    (
        "steps:\n  - factorize: {groups: qk}\n",
        "2:17: factorize.groups",
        "nothing says how much stays of the groups",
    ),
    (
        "steps:\n  - factorize: {keep: 0.5, rank: 8}\n",
        "2:5: factorize",
        "keep and rank both say how much stays",
    ),
    ("steps:\n  - basel: {keep: 0.5, target: absent.txt}\n", "2:24: absent.txt", "no such file"),
    ("calibration:\n  tokens: 5\n", "2:3: calibration.tokens", "5 tokens are too few"),
    ("target: {context_length: 5}\n", "1:10: target.context_length", "too short to verify a bundle in"),
    ("budget: {size: 90XB}\n", "1:10: budget.size", "'90XB' is no size"),
    ("budget: {keep: 1.5}\n", "1:10: budget.keep", "1.5 is not a share"),
    ("budget: {speed_up: 0.5}\n", "1:10: budget.speed_up", "no speed-up"),
    ("budget: {mean_bits: 1}\n", "1:10: budget.mean_bits", "1.0 bits"),
    ("budget: {}\n", "1:1: budget", "it holds no amount"),
    ("budget: {size: 90MB, keep: 0.9}\n", "1:1: budget", "keep and size are two budgets"),
    ("budget: {keep: 0.5, phase: prefill}\n", "1:21: budget.phase", "a phase goes with speed_up"),
]
TOGETHER = [
    ("steps:\n  - cap: {keep: 0.5}\n    heal: {steps: 5}\n", "2:5: steps", "2 steps in one entry"),
    ("steps:\n  - quantize: {bits: 4}\n  - prune: {blocks: 1}\n", "3:5: prune", "it stands after quantize"),
    ("steps:\n  - heal: {steps: 5}\n  - cap: {keep: 0.5}\n", "3:5: cap", "it stands after heal"),
    ("steps:\n  - prune: {blocks: 1}\n  - prune: {blocks: 2}\n", "3:5: prune", "the step stands twice"),
    ("steps:\n  - cap: {keep: 0.5}\n  - sslc: {keep: 0.5}\n", "3:5: sslc", "cap decides already"),
    ("steps:\n  - factorize: {}\n  - cap: {keep: 0.5}\n", "3:5: cap", "factorize decides already"),
    (
        "budget: {size: 90MB}\nsteps:\n  - cap: {keep: 0.9}\n",
        "1:1: budget",
        "the step cap says how much stays",
    ),
    ("budget: {size: 90MB}\nsteps:\n  - factorize: {keep: 0.9}\n", "1:1: budget", "both say how much stays"),
    (
        "steps:\n  - quantize: {with: rtn}\n  - quantize: {targets: lm_head, with: gptq}\n",
        "3:34: quantize.with",
        "gptq and rtn cannot round the same model",
    ),
    (
        "steps:\n  - quantize: {targets: all, bits: 8, activations: 8}\n",
        "2:39: quantize.activations",
        "embed_tokens has no inputs to quantize",
    ),
    (
        "target: {ep: cuda}\nsteps:\n  - quantize: {bits: 8, activations: 8}\n  - quantize: {targets: lm_head}\n",
        "3:25: quantize.activations",
        "no kernels in a graph for cuda",
    ),
    (
        "steps:\n  - prune: {blocks: 1}\n  - quantize: {with: carry}\n",
        "3:16: quantize.with",
        "which prune does",
    ),
    ("steps:\n  - correct: {rank: 4}\n", "2:5: correct", "only weight-only quantization is corrected"),
    (
        "budget: {size: 90MB}\nsteps:\n  - quantize: {bits: auto}\n  - correct: {rank: 4}\n",
        "4:5: correct",
        "a budget does not price corrections",
    ),
    (
        "calibration: {prefix: true}\nsteps:\n  - cap: {keep: 0.5}\n",
        "1:15: calibration.prefix",
        "the parts of cap do not depend on the compressed prefix",
    ),
]


def refusal(folder: Path, text: str) -> InputError:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as caught:
        load(path)
    return caught.value


def place(folder: Path, error: InputError) -> str:
    """Return where an error lies within the file."""
    return str(error.where).removeprefix(f"{folder / 'mine.yaml'}:")


@pytest.mark.parametrize(("text", "where", "hint"), MISSPELLED)
def test_a_misspelled_name_is_told_with_the_nearest_one(
    tmp_path: Path, text: str, where: str, hint: str
) -> None:
    error = refusal(tmp_path, text)
    assert (place(tmp_path, error), error.what) == (where, "there is no such field")
    assert hint in str(error.fix)


@pytest.mark.parametrize(("text", "where", "what"), TYPES)
def test_a_value_of_another_type(tmp_path: Path, text: str, where: str, what: str) -> None:
    error = refusal(tmp_path, text)
    assert place(tmp_path, error) == where
    assert what in error.what
    assert "`rk-export recipes --steps`" in str(error.fix)


@pytest.mark.parametrize(("text", "where"), MISSING)
def test_a_missing_field_is_named_where_its_step_stands(tmp_path: Path, text: str, where: str) -> None:
    error = refusal(tmp_path, text)
    assert (place(tmp_path, error), error.what) == (where, "the field is missing")


@pytest.mark.parametrize(("text", "where", "what"), [*REFUSED, *TOGETHER])
def test_a_value_that_cannot_be(tmp_path: Path, text: str, where: str, what: str) -> None:
    error = refusal(tmp_path, text)
    assert place(tmp_path, error) == where
    assert what in error.what
    assert error.fix


@pytest.mark.parametrize("kind", step_kinds(), ids=lambda kind: kind.name)
def test_a_field_that_no_step_has_is_refused_in_every_step(tmp_path: Path, kind: type[Step]) -> None:
    error = refusal(tmp_path, f"steps:\n  - {kind.name}: {{nothing: 5}}\n")
    assert place(tmp_path, error) == f"2:{8 + len(kind.name)}: {kind.name}.nothing"


def test_in_python_an_error_names_the_field_alone() -> None:
    with pytest.raises(InputError) as caught:
        Recipe.load("int4").with_step(Recipe.load("cap").steps[0]).with_step(Recipe.load("sslc").steps[0])
    assert caught.value.where == "sslc"

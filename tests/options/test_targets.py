"""Targets and what is ignored: roles, patterns and regular expressions; a name that matches nothing is an error."""

from __future__ import annotations

from typing import Any

import pytest
from compressed import SourceOf

from rk_export.commands.checks import check_options
from rk_export.errors import InputError
from rk_export.options.factorize import Factorize
from rk_export.options.quantization import QuantSpec
from rk_export.options.quantize import TABLES, Quantize, matches, names_of, names_of_table
from rk_export.options.ranks import Budget
from rk_export.options.recipe import Recipe
from rk_export.planning.planner import decide_plan

DOWN = names_of("down", "mlp.down_proj", 3)


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("all", True), ("layers", True), ("down", True), ("layers.3.mlp.down_proj", True),
        ("layers.*.mlp.down_proj", True), ("layers.3.*", True), ("*down_proj", True), ("layers.[3-5].*", True),
        (r"re:layers\.\d+\.mlp\..*", True), ("re:down", True), ("re:layers.3.*", True),
        ("up", False), ("layer", False), ("Down", False), ("mlp.down_proj", False), ("layers.4.*", False),
        ("embed_tokens", False), ("lm_head", False), ("re:mlp", False), (r"re:layers\.3", False), ("", False),
    ],
)  # fmt: skip
def test_what_a_name_means(target: str, found: bool) -> None:
    assert matches(target, DOWN) is found


@pytest.mark.parametrize(
    ("target", "found"),
    [("all", TABLES), ("layers", ()), ("*", TABLES), ("embed_tokens", TABLES[:1]), ("lm_*", TABLES[1:])],
)
def test_what_a_name_means_of_the_tables(target: str, found: tuple[str, ...]) -> None:
    assert tuple(table for table in TABLES if matches(target, names_of_table(table))) == found


def test_what_is_ignored_is_not_taken() -> None:
    step = Quantize(("layers", "embed_tokens"), ("down", r"re:layers\.0\..*"))
    assert not step.takes(DOWN)
    assert step.takes(names_of("up", "mlp.up_proj", 3))
    assert not step.takes(names_of("up", "mlp.up_proj", 0))
    assert step.takes(names_of_table("embed_tokens"))
    assert not step.takes(names_of_table("lm_head"))


def test_the_later_step_holds_and_what_it_ignores_stays_with_the_earlier_one() -> None:
    recipe = Recipe((Quantize(), Quantize(("down", "up"), ("layers.0.*",), bits=8)))
    assert recipe.format_of("down", "mlp.down_proj", 3) == QuantSpec(8, 32)
    assert recipe.format_of("down", "mlp.down_proj", 0) == QuantSpec(4, 32)
    assert recipe.format_of("q", "self_attn.q_proj", 3) == QuantSpec(4, 32)
    assert recipe.quant == QuantSpec(4, 32)
    assert recipe.table_quant is recipe.head_quant is None


def test_open_formats_of_some_matrices() -> None:
    recipe = Recipe((Quantize(bits=8), Quantize(("down",), bits="auto")), budget=Budget("size", 1e6))
    assert recipe.is_open("down", "mlp.down_proj", 0)
    assert not recipe.is_open("up", "mlp.up_proj", 0)
    assert not recipe.table_is_open
    assert not Recipe().is_open("up", "mlp.up_proj", 0)
    assert Recipe((Quantize(("all",), bits="auto"),)).table_is_open


def formats(source_of: SourceOf, family: str, *steps: Quantize) -> dict[str, Any]:
    """Return the format of every site of the first layer."""
    sites = decide_plan(source_of(family), Recipe(steps)).of_layer(0)
    return {site.site.removeprefix("layers.0."): site.quant for site in sites}


def test_a_plan_has_the_formats_of_the_steps(source_of: SourceOf) -> None:
    found = formats(
        source_of,
        "llama",
        Quantize(("layers",), ("v", "layers.1.*")),
        Quantize(("*.mlp.up_proj",), bits=8, block=64),
    )
    assert found.pop("v") is None
    assert found.pop("up") == QuantSpec(8, 64)
    assert set(found.values()) == {QuantSpec(4, 32)}
    dense = decide_plan(source_of("llama"), Recipe((Quantize(("layers",), ("layers.1.*",)),))).of_layer(1)
    assert {site.quant for site in dense} == {None}


def test_experts_are_a_role(source_of: SourceOf) -> None:
    found = formats(source_of, "mixtral", Quantize(), Quantize(("expert",), bits=8))
    assert found.pop("experts") == QuantSpec(8, 32)
    assert set(found.values()) == {QuantSpec(4, 32)}


# --- refused before any work


@pytest.mark.parametrize("field", ["targets", "ignore"])
@pytest.mark.parametrize(
    ("family", "pattern", "hint"),
    [
        ("llama", "downn", "did you mean down? "),
        ("llama", "layers.7.*", "name one of"),
        ("llama", "re:model[.]layers.*", "name one of"),
        ("llama", "expert", "name one of"),
        ("gpt2", "gate", "name one of"),
        ("mixtral", "down", "name one of"),
    ],
)
def test_a_name_that_matches_nothing(
    source_of: SourceOf, family: str, pattern: str, hint: str, field: str
) -> None:
    step = Quantize(("layers", pattern)) if field == "targets" else Quantize(ignore=(pattern,))
    with pytest.raises(InputError, match="matches no matrix") as caught:
        check_options(source_of(family), Recipe((step,)))
    assert repr(pattern) in caught.value.what
    assert str(caught.value.where).startswith("quantize")
    assert hint in str(caught.value.fix)
    assert "layers.0." in str(caught.value.fix)


@pytest.mark.parametrize(
    "target",
    ["all", "layers", "q", "embed_tokens", "lm_head", "layers.1.*", "*proj", "re:layers.[01].self.*"],
)
def test_a_name_that_matches_something(source_of: SourceOf, target: str) -> None:
    steps = (Quantize((target,)), Quantize(TABLES, bits=8))
    check_options(source_of("llama"), Recipe(steps))


@pytest.mark.parametrize(("tied", "what"), [(True, "one matrix"), (False, "stored in one format")])
@pytest.mark.parametrize(
    "steps",
    [
        (Quantize(("embed_tokens",), bits=8),),
        (Quantize(("lm_head",), bits=8),),
        (Quantize(("all",), ("lm_head",)),),
        (Quantize(("embed_tokens",), bits=8), Quantize(("lm_head",), bits=4)),
    ],
)
def test_both_tables_have_one_format(
    source_of: SourceOf, steps: tuple[Quantize, ...], tied: bool, what: str
) -> None:
    with pytest.raises(InputError, match=what) as caught:
        check_options(source_of("llama", tie_word_embeddings=tied), Recipe(steps))
    assert caught.value.fix == "name both: [embed_tokens, lm_head]"


@pytest.mark.parametrize(
    ("family", "steps"),
    [
        ("llama", (Factorize(("qk",), keep=0.5), Quantize(("q",)))),
        ("llama", (Factorize(("gate_up",), keep=0.5), Quantize(), Quantize(("up",), bits=8))),
        ("llama", (Factorize(keep=0.5), Quantize(ignore=("layers.1.self_attn.k_proj",)))),
        ("mixtral", (Quantize(("*experts.0.*",)),)),
    ],
)
def test_what_shares_a_site_has_one_format(source_of: SourceOf, family: str, steps: Any) -> None:
    with pytest.raises(InputError, match="share a site, and need one format") as caught:
        check_options(source_of(family), Recipe(steps))
    assert str(caught.value.where).startswith("quantize: layers.")


def test_matrices_that_are_not_joined_may_differ(source_of: SourceOf) -> None:
    steps = (Factorize(("gate_up",), keep=0.5), Quantize(("layers",), ("q",)))
    check_options(source_of("llama"), Recipe(steps))

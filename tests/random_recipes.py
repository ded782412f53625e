"""Random recipes for property tests: any steps and sections that go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from rk_export.errors import InputError
from rk_export.methods.basel.options import BaselOptions
from rk_export.methods.cap.options import CapOptions
from rk_export.methods.heal.options import TRAINABLE, HealOptions
from rk_export.methods.prune.options import PruneOptions
from rk_export.methods.sslc.options import SslcOptions
from rk_export.options.calibration import CalibrationOptions
from rk_export.options.correct import Correct
from rk_export.options.factorize import Factorize
from rk_export.options.prepare import PREPARATIONS, Prepare
from rk_export.options.quantize import Quantize
from rk_export.options.ranks import GROUPS, Budget
from rk_export.options.recipe import Recipe
from rk_export.options.step import Step
from rk_export.options.target import Target
from rk_export.options.texts import TextFile

_SHARES = st.floats(0, 1, exclude_min=True, exclude_max=True)
_POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False, allow_nan=False)
_COUNTS = st.integers(1, 10**6)
_SEEDS = st.integers(0, 2**63)
_SIZES = st.integers(1, 10**12).map(float)
# Every text that can be a file's name, and those that YAML would take for something else.
_NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=20),
    st.sampled_from(
        ("1e3", "5", "1:30", "0x1F", "null", "yes", "none", "self", "~", "- a", "a: b", "#", "[", "é")
    ),
)
_TEXTS = st.builds(TextFile, _NAMES, st.text("0123456789abcdef", min_size=64, max_size=64))
_TARGETS = st.one_of(
    st.sampled_from(
        ("all", "layers", "q", "expert", "embed_tokens", "layers.*.mlp.down_proj", "re:.*q_proj")
    ),
    _NAMES.filter(lambda name: not name.startswith("re:")),
)


def _names(of: Sequence[str]) -> st.SearchStrategy[tuple[str, ...]]:
    return st.lists(st.sampled_from(of), unique=True).map(tuple)


def _amount(kinds: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Return one of several ways to say how much stays."""
    return st.one_of([st.fixed_dictionaries({name: values}) for name, values in kinds.items()])


def _built(kind: type, *parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[Any]:
    """Return a dataclass from parts of its fields; None where they do not go together."""

    def build(found: tuple[dict[str, Any], ...]) -> Any:
        try:
            return kind(**{name: value for part in found for name, value in part.items()})
        except InputError:
            return None

    return st.tuples(*parts).map(build).filter(lambda value: value is not None)


def _optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


_SHARE_OR_SIZE = _amount({"keep": _SHARES, "size": _SIZES})
_KINDS: dict[str, st.SearchStrategy[Step]] = {
    "prune": _built(
        PruneOptions,
        _optional(
            blocks=st.integers(0, 9),
            ffn_keep=_SHARES | st.just(1.0),
            kv_heads_keep=st.none() | st.integers(1, 9),
        ),
    ),
    "prepare": _built(Prepare, _optional(names=st.just("auto") | _names(PREPARATIONS))),
    "factorize": _built(
        Factorize,
        _amount({"keep": _SHARES, "rank": _COUNTS, "energy": _SHARES, "groups": st.none()}),
        _optional(
            groups=_names(tuple(GROUPS)),
            allocation=st.sampled_from(("uniform", "energy", "stable-rank")),
            qk=st.sampled_from(("whole", "per-head")),
            form=st.sampled_from((None, "plain", "identity")),
            gauge=st.sampled_from(("orthogonal", "balanced")),
            rank_multiple=st.none() | _COUNTS,
        ),
    ),
    "cap": _built(
        CapOptions,
        _SHARE_OR_SIZE,
        _optional(
            selector=st.sampled_from(("policy", "pools", "auction", "wanda", "magnitude")),
            steps=_COUNTS,
            learning_rate=_POSITIVE,
            seed=_SEEDS,
        ),
    ),
    "sslc": _built(SslcOptions, _SHARE_OR_SIZE, _optional(stages=_COUNTS)),
    "basel": _built(
        BaselOptions,
        st.fixed_dictionaries({"target": _TEXTS}),
        _amount({"keep": _SHARES, "energy": _SHARES}),
        _optional(
            tune=st.integers(0, 99),
            bases=st.sampled_from(("plain", "whitened")),
            form=st.sampled_from(("plain", "identity")),
            learning_rate=_POSITIVE,
        ),
    ),
    "quantize": _built(
        Quantize,
        _optional(
            targets=st.lists(_TARGETS, min_size=1, max_size=3).map(tuple),
            ignore=st.lists(_TARGETS, max_size=2).map(tuple),
            bits=st.sampled_from(("auto", 2, 4, 8)),
            block=st.sampled_from((None, 16, 32, 64, 128, 256)),
            symmetric=st.booleans(),
            activations=st.sampled_from((16, 8)),
            quantizer=st.sampled_from((None, "rtn", "search", "gptq", "carry")),
        ),
    ),
    "correct": st.builds(Correct, _COUNTS),
    "heal": _built(
        HealOptions,
        st.fixed_dictionaries({"steps": _COUNTS}),
        _optional(
            warmup=_SHARES,
            temperature=_POSITIVE,
            what=_names(TRAINABLE).filter(bool),
            precision=st.sampled_from(("auto", "fp32", "bf16")),
        ),
    ),
}
_DECIDING = ("factorize", "cap", "sslc", "basel")
_CALIBRATIONS = st.builds(
    CalibrationOptions,
    st.sampled_from(("self", "gain", "none")) | _TEXTS,
    tokens=st.integers(512, 10**6),
    seed=_SEEDS,
    gradients=st.booleans(),
    prefix=st.booleans(),
)
_BUDGETS = st.one_of(
    st.builds(Budget, st.just("keep"), _SHARES),
    st.builds(Budget, st.just("size"), _SIZES | st.just("int4")),
    st.builds(Budget, st.just("mean_bits"), st.floats(2, 16)),
    st.builds(
        Budget,
        st.just("speed_up"),
        st.floats(1, exclude_min=True, allow_infinity=False),
        st.sampled_from(("prefill", "decode")),
    ),
)
_PLACES = st.builds(
    Target,
    st.sampled_from(("cpu", "cuda", "portable")),
    st.sampled_from((0, 1, 4)),
    st.none() | st.integers(64, 10**6),
)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Draw a recipe: steps are left out until those that are left go together."""
    calibration, budget, target = draw(_CALIBRATIONS), draw(st.none() | _BUDGETS), draw(_PLACES)
    recipe, left_out = Recipe(target=target), set(_DECIDING) - {draw(st.sampled_from(_DECIDING))}
    for name, kind in _KINDS.items():
        if name in left_out:
            continue
        for step in draw(st.lists(kind, max_size=3 if name == "quantize" else 1)):
            recipe = _or(recipe, (*recipe.steps, step), recipe.calibration, None, target)
    recipe = _or(recipe, recipe.steps, calibration, None, target)
    return _or(recipe, recipe.steps, recipe.calibration, budget, target)


def _or(recipe: Recipe, *fields: Any) -> Recipe:
    """Return the recipe of some fields, or the one before where they do not go together."""
    try:
        return Recipe(*fields)
    except InputError:
        return recipe

"""No silent option: another value in any field of a config is refused by name, or the graph computes the same with it.

Each field of a family's config class, each name that its code asks the config for, and each kind of rotary scaling is
given other values. Then one of these must hold:

- transformers builds no model of it, or one whose logits are not finite;
- it is refused before any weight is read, and the message names the field;
- neither transformers' logits nor what is read from the config change;
- the exported graph computes what transformers computes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from config_walk import EXACT, REFUSED, WITHOUT_EFFECT, Walk
from family_runs import EVERYTHING, families, record, sampled

pytestmark = pytest.mark.whole

# In a normal run, one change of so many, of a sixth of the families.
ONE_IN = 30


@pytest.mark.parametrize("name", sampled(families(), 6))
def test_no_field_is_ignored(name: str, tmp_path: Path) -> None:
    walk = Walk(name, tmp_path)
    found, reasons, violations = Counter[str](), {}, []
    for change in sampled(walk.changes, ONE_IN, lambda change: f"{name}.{change}"):
        try:
            outcome, reason = walk.outcome(change)
        except Exception as error:  # a crash of ours is a violation too
            violations.append(f"{change}: {type(error).__name__}: {error}")
            continue
        found[outcome] += 1
        if outcome == REFUSED:
            reasons[str(change)] = reason
    assert not violations, "\n".join(violations)
    if EVERYTHING:
        record(name, "fields", {"outcomes": found, "refused": reasons})
        assert min(found[kind] for kind in (REFUSED, WITHOUT_EFFECT, EXACT)) > 0, found

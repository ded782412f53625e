"""The findings of all passes, gathered into one record a matrix group.

A group may meet several passes (factorized, then both factors quantized). Findings belong together when their
targets are equal or one lies inside the other, as ``layers.3.mlp.gate_up.down`` in ``layers.3.mlp.gate_up``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rk_export.report.records import Finding, Outcome

_INDEX = re.compile(r"\.(\d+)(?=\.|$)")


def split_target(target: str) -> tuple[int | None, str]:
    """Return the layer index and the role of a target: ``layers.3.mlp.gate_up`` -> ``(3, "mlp.gate_up")``.

    Indices after the first (experts) become ``*``; a target outside the layers is its own role.
    """
    match = _INDEX.search(target)
    if match is None:
        return None, target
    inside = _INDEX.sub(".*", target[match.end() :]).lstrip(".")
    return int(match.group(1)), inside or target[: match.start()]


@dataclass(frozen=True)
class MatrixGroup:
    """All findings at one target and inside it, in the order of the passes."""

    target: str
    findings: tuple[Finding, ...]

    @property
    def layer(self) -> int | None:
        """Index of the decoder layer, or None outside the layers."""
        return split_target(self.target)[0]

    @property
    def role(self) -> str:
        """What the group is within its layer, e.g. ``self_attn.qk``."""
        return split_target(self.target)[1]

    @property
    def applied(self) -> tuple[Finding, ...]:
        """The findings of passes that changed something."""
        return tuple(finding for finding in self.findings if finding.outcome is Outcome.APPLIED)

    @property
    def status(self) -> str:
        """``applied``, ``skipped``, ``refused``, or ``partly`` where some passes changed it, some not."""
        outcomes = {finding.outcome for finding in self.findings}
        if outcomes == {Outcome.APPLIED}:
            return "applied"
        if Outcome.APPLIED in outcomes:
            return "partly"
        return "refused" if Outcome.REFUSED in outcomes else "skipped"

    @property
    def reason(self) -> str:
        """The distinct reasons, joined."""
        return "; ".join(dict.fromkeys(finding.reason for finding in self.findings if finding.reason))

    @property
    def bytes_before(self) -> int:
        """Stored bytes before the first pass."""
        saved = 0
        for finding in self.findings:
            if finding.target == self.target and finding.bytes_before:
                return finding.bytes_before + saved
            saved += _saved(finding)
        firsts = {finding.target: finding.bytes_before for finding in reversed(self.findings)}
        return sum(firsts.values())

    @property
    def bytes_after(self) -> int:
        """Stored bytes after the last pass."""
        return self.bytes_before - sum(map(_saved, self.findings))

    @property
    def errors(self) -> tuple[float, ...]:
        """Relative errors in the order of the passes; they do not add up exactly."""
        return tuple(finding.error for finding in self.applied if finding.error is not None)

    def choices(self, key: str) -> tuple[Any, ...]:
        """Return the distinct values of ``details[key]`` over the applied passes."""
        values = [(finding.details or {}).get(key) for finding in self.applied]
        return tuple(value for i, value in enumerate(values) if value is not None and value not in values[:i])

    @property
    def rank(self) -> float | None:
        """The last rank chosen (the mean over heads where it is a list), or None where the group is dense."""
        ranks = self.choices("rank")
        if not ranks:
            return None
        last = ranks[-1]
        return sum(last) / len(last) if isinstance(last, (list, tuple)) else float(last)


def _saved(finding: Finding) -> int:
    return finding.bytes_before - finding.bytes_after if finding.outcome is Outcome.APPLIED else 0


def matrix_groups(findings: Sequence[Finding]) -> tuple[MatrixGroup, ...]:
    """Gather findings by matrix group, in the order in which the groups first appear."""
    targets = {finding.target for finding in findings}
    members: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        members[_outermost(finding.target, targets)].append(finding)
    return tuple(MatrixGroup(target, tuple(group)) for target, group in members.items())


def _outermost(target: str, targets: set[str]) -> str:
    parts = target.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((prefix for prefix in prefixes if prefix in targets), target)


def by_role(groups: Iterable[MatrixGroup]) -> dict[str, list[MatrixGroup]]:
    """Return the groups of each role, roles in the order in which they first appear."""
    roles: dict[str, list[MatrixGroup]] = defaultdict(list)
    for group in groups:
        roles[group.role].append(group)
    return dict(roles)

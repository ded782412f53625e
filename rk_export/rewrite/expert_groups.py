"""Which layers' experts go into one node of the graph, and what the report says of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rk_export.model.canonical import Experts
from rk_export.model.grouped_experts import why_not_grouped
from rk_export.report.records import Finding, Outcome
from rk_export.rewrite.apply import Rewritten

_PASS = "grouped experts"


def experts_by_layer(rewritten: Rewritten) -> Iterator[tuple[int, Experts]]:
    """Yield the experts of every layer that has a mixture, with the layer's index."""
    mixture = rewritten.architecture.mixture
    if mixture is None:
        return
    for index in range(rewritten.description.layer_count):
        if mixture.within(rewritten.description.config, index):
            experts = rewritten.model.get_submodule(
                f"{rewritten.architecture.layers}.{index}.{mixture.experts}"
            )
            assert isinstance(experts, Experts)  # the model is in canonical form
            yield index, experts


def why_not(rewritten: Rewritten, experts: Experts) -> str:
    """Return why one node cannot compute a layer's experts exactly, or an empty string."""
    activation = rewritten.description.decoder.activation
    return why_not_grouped(experts, activation, rewritten.plan.recipe)


def grouped_layers(rewritten: Rewritten) -> dict[int, Experts]:
    """Return the experts of the layers whose chosen experts alone are computed, by layer."""
    return {
        index: experts for index, experts in experts_by_layer(rewritten) if not why_not(rewritten, experts)
    }


def with_expert_findings(rewritten: Rewritten) -> Rewritten:
    """Return a rewritten model with a finding for every mixture: how its experts are computed, and why."""
    findings = [
        _finding(index, why_not(rewritten, experts)) for index, experts in experts_by_layer(rewritten)
    ]
    return replace(rewritten, findings=(*rewritten.findings, *findings))


def _finding(layer: int, obstacle: str) -> Finding:
    site, details = f"layers.{layer}.experts", {"pass": _PASS}
    if obstacle:
        reason = f"every expert computes every token, more slowly: {obstacle}"
        return Finding(site, Outcome.SKIPPED, reason, details=details)
    return Finding(site, Outcome.APPLIED, "the chosen experts alone compute a token", details=details)

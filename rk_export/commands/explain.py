"""What happened to each matrix of a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rk_export.plan import Plan, SitePlan
from rk_export.report.records import Finding, Outcome, Report


def explain(bundle: str | Path) -> tuple[Finding, ...]:
    """Return what happened to each matrix of a bundle: the report's findings, and the plan where they say nothing.

    Raises:
        InputError: If the bundle's report or plan is missing or broken.
    """
    folder = Path(bundle)
    findings = Report.load(folder / "report.json").findings
    told = {finding.target for finding in findings}
    sites = {site.site: site for site in Plan.load(folder / "plan.json").sites}
    return (
        *(_with_runner_up(finding, sites.get(finding.target)) for finding in findings),
        *(_planned_only(site) for name, site in sites.items() if name not in told),
    )


def _with_runner_up(finding: Finding, site: SitePlan | None) -> Finding:
    """Return a finding that also says what the planner would have chosen next."""
    if site is None or not site.runner_up:
        return finding
    return replace(finding, details={**(finding.details or {}), "runner_up": site.runner_up})


def _planned_only(site: SitePlan) -> Finding:
    """Return the finding of a site that no pass touched in this run: it stayed as it was in the model."""
    if site.form == "dense" and site.quant is None:
        return Finding(site.site, Outcome.SKIPPED, site.reason or "not asked for: stays dense, in floats")
    details: dict[str, object] = {"rank": site.rank} if site.rank else {}
    if site.quant is not None:
        details |= site.quant.details()
    return Finding(site.site, Outcome.SKIPPED, "came so from the checkpoint", details=details)

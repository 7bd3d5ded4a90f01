"""All pathologies that a run shows, and their words for the terminal."""

from preftune.report.doctor.base import Finding
from preftune.report.doctor.results import RESULTS
from preftune.report.doctor.training import TRAINING
from preftune.report.view import RunView

PATHOLOGIES = (*TRAINING, *RESULTS)


def diagnose(run: RunView) -> tuple[Finding, ...]:
    """Every finding, those of training first. A run that is under way is judged by what it has written."""
    return tuple(finding for pathology in PATHOLOGIES for finding in pathology.findings(run))


def text(findings: tuple[Finding, ...], run: RunView) -> str:
    """For the terminal: a paragraph a finding, or one line that says how much was looked at."""
    steps = sum(len(stage.metrics) for stage in run.stages)
    looked = f"{len(PATHOLOGIES)} kinds looked for in {steps:,} steps of {len(run.stages)} stages"
    looked += f" and {len(run.policies)} evaluated policies"
    if not findings:
        return "\n\n".join([*run.outdated, f"nothing found: {looked}"])
    paragraphs = [
        f"{f.where}: {f.kind}\n  seen    {f.evidence}\n  reason  {f.reason}\n  try     {f.remedy}"
        for f in findings
    ]
    return "\n\n".join([*run.outdated, *paragraphs, f"{len(findings)} found; {looked}"])

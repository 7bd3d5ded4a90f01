"""What a finding is, and how the rows of a stage's metrics are read for one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, nan
from statistics import mean
from typing import NamedTuple

from preftune.report.view import RunView, StageView

FEW_ROWS = 6  # below so many steps a course of a metric says nothing


@dataclass(frozen=True, slots=True)
class Finding:
    """One pathology that a run shows: where, and the numbers that show it."""

    kind: str
    where: str  # a stage or a policy
    evidence: str
    reason: str
    remedy: str


Symptom = tuple[str, str]  # where, evidence


@dataclass(frozen=True, slots=True)
class Pathology:
    """A kind of finding: what looks for it, why it happens and what helps."""

    kind: str
    reason: str
    remedy: str
    look: Callable[[RunView], Iterable[Symptom]]

    def findings(self, run: RunView) -> Iterator[Finding]:
        for where, evidence in self.look(run):
            yield Finding(self.kind, where, evidence, self.reason, self.remedy)


def in_stages(look: Callable[[StageView], str | None]) -> Callable[[RunView], Iterator[Symptom]]:
    """A look at one stage, at every stage of a run. It gives the evidence, None where all is well."""

    def looked(run: RunView) -> Iterator[Symptom]:
        for stage in run.stages:
            if evidence := look(stage):
                yield stage.name, evidence

    return looked


def course(stage: StageView, *names: str) -> list[float]:
    """The finite values of the first of these metrics that the stage writes, one a step."""
    rows = stage.metrics
    name = next((name for name in names if any(name in row.numbers for row in rows)), None)
    return [v for row in rows if name and isfinite(v := row.numbers.get(name, nan))]


class Thirds(NamedTuple):
    """Means over the first and over the last third of a course."""

    first: float
    last: float


def thirds(values: Sequence[float]) -> Thirds | None:
    """None for a course that is too short."""
    if len(values) < FEW_ROWS:
        return None
    third = max(2, len(values) // 3)
    return Thirds(mean(values[:third]), mean(values[-third:]))

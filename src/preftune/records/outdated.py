"""Which numbers of an evaluation are of models that are no longer there. From records alone, and no library.

An evaluation records the sum of every model that it measured (`made_from`), and the stages whose models all
its numbers depend on (`shared`): what the policies are compared with, and the judges. A stage that was
trained again, or whose model is gone, has another sum by now, or none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preftune.rundir import BASE, RunDir, policy_name, read_json, read_jsonl
from preftune.sums import model_sum, read_sealed
from preftune.untrusted import clean

AGAIN = "preftune evaluate RUN measures what is there"
_NAME = "evaluation"  # the stage of that name


@dataclass(frozen=True, slots=True)
class Outdated:
    """Stages whose measured models are no longer there, and whether all numbers depend on one of those."""

    stages: tuple[str, ...] = ()
    all: bool = False

    def policy(self, name: str) -> bool:
        """Whether a policy's numbers and samples are of a model that is no longer there; of best-of-n, which
        has no model of its own, those of the shared ones count.
        """
        return self.all or name in map(policy_name, self.stages)

    def judge(self, stage: str) -> bool:
        """Whether the numbers about a reward model are of one that is no longer there."""
        return stage in self.stages

    @property
    def reason(self) -> str:
        """In words, whose the numbers are."""
        names = " and ".join(clean(name, 60) for name in self.stages)
        if len(self.stages) > 1:
            return f"of models of {names} that are no longer there"
        return f"of a model of {names} that is no longer there"


def outdated(run: RunDir) -> Outdated:
    """Of the run's own evaluation; nothing of one from before sums were kept."""
    return outdated_in(run, run.evaluations, read_sealed(run.stage_json(_NAME)))


def outdated_in(run: RunDir, folder: Path, record: Mapping[str, Any]) -> Outdated:
    """Of the evaluation in `folder` with this record."""
    made_from = record.get("made_from")
    made_with = {name: old for name, old in made_from.items() if old} if isinstance(made_from, dict) else {}
    stages = tuple(name for name, old in made_with.items() if model_sum(run, name) != old)
    return Outdated(
        stages, all=bool(stages) and not _shared(run, folder, record, made_with).isdisjoint(stages)
    )


def _shared(run: RunDir, folder: Path, record: Mapping[str, Any], made_with: Mapping[str, str]) -> set[str]:
    """The stages that all numbers depend on. If the record does not list them: the reference, the judge, and
    every stage that is no measured policy and makes no data.
    """
    names = record.get("shared")
    if isinstance(names, list):
        return set(map(str, names))
    policies = {name for name in made_with if (folder / f"{policy_name(name)}.json").is_file()}
    shared = {name for name in made_with if name not in policies and not run.collected(name).is_dir()}
    comparisons, examined = folder / "comparisons.jsonl", folder / "reward_model.json"
    rows = read_jsonl(comparisons) if comparisons.is_file() else []
    shared |= {str(rows[0].get("reference")).removeprefix(policy_name(""))} if rows else {BASE}
    judge = read_json(examined) if examined.is_file() else {}
    return shared | ({str(judge.get("stage"))} if isinstance(judge, dict) else set())

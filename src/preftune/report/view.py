"""A run as one frozen view: what was measured, typed. Every part may be missing, as in a run of one stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preftune.records.policy import MAX_LABEL, BestOf, Comparison, PairsFile, PairsPolicy, PolicyRecord
from preftune.records.reward_model import Mistake, RewardModelRecord
from preftune.records.run import DataRecord, RunRecord, SampleRow, TokenRow
from preftune.records.stage import MetricsRow, StageRecord
from preftune.report.text import clean
from preftune.rundir import BASE

Row = Mapping[str, Any]
SFT = "policy_sft"
CHOSEN = "chosen"  # the response that people preferred, as a reference of comparisons


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """One stage: its record and its metric rows (each with "step" and "time")."""

    name: str
    status: str
    record: StageRecord
    metrics: tuple[MetricsRow, ...] = ()
    settings: Row = field(default_factory=dict)

    @property
    def algorithm(self) -> str:
        return self.record.algorithm


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherPairs:
    """What `evaluate --pairs FILE` found: the reward models and the policies on foreign pairs."""

    of: PairsFile
    reward_models: tuple[RewardModelRecord, ...] = ()
    policies: tuple[PairsPolicy, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Everything the report shows, read once."""

    name: str
    config: Row
    config_text: str = ""
    record: RunRecord = field(default_factory=RunRecord)
    data: DataRecord | None = None
    stages: tuple[StageView, ...] = ()
    policies: tuple[PolicyRecord, ...] = ()
    reward_model: RewardModelRecord | None = None
    comparisons: tuple[Comparison, ...] = ()
    samples: Mapping[str, tuple[SampleRow, ...]] = field(default_factory=dict)
    mistakes: tuple[Mistake, ...] = ()
    missing: tuple[str, ...] = ()
    best_of: tuple[BestOf, ...] = ()
    other_reward_models: tuple[RewardModelRecord, ...] = ()
    other_pairs: tuple[OtherPairs, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)  # by dotted key: default, recipe, command line
    recipe: str = ""
    tokens: tuple[TokenRow, ...] = ()  # replies that were looked up token by token

    def policy(self, name: str) -> PolicyRecord | None:
        """The policy of that name, if it was evaluated."""
        return next((policy for policy in self.policies if policy.policy == name), None)

    @property
    def golds(self) -> tuple[str, ...]:
        """Names of the judges that no training saw, besides the world's own score."""
        return tuple(dict.fromkeys(name for policy in self.policies for name in policy.golds))

    @property
    def gold_words(self) -> str:
        """Whose score `gold` is."""
        if not self.golds or (self.data is not None and self.data.world):
            return "the world's gold score"
        return f"the gold score of {clean(self.golds[0], MAX_LABEL)}"

    @property
    def reference(self) -> str:
        """The policy that all others are compared with: the sft stage's, or the base model without one."""
        recorded = (row.reference for row in self.comparisons)
        return next(recorded, SFT if self.policy(SFT) is not None else BASE)

    def label(self, policy: str) -> str:
        """What a policy is called in text."""
        if policy == CHOSEN:
            return "the human-chosen response"
        evaluated = self.policy(policy)
        return evaluated.label if evaluated else clean(policy, MAX_LABEL)

    def comparison(
        self, policy: str, measure: str = "score", against: str | None = None
    ) -> Comparison | None:
        """The recorded comparison of `policy` in `measure` with `against`, by default the reference."""
        reference = self.reference if against is None else against
        rows = (row for row in self.comparisons if row.policy == policy and row.measure == measure)
        return next((row for row in rows if row.reference == reference), None)

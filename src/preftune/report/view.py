"""A run as one frozen view: what was measured, typed. Every part may be missing, as in a run of one stage."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from preftune.config import config_of
from preftune.records.policy import MAX_LABEL, BestOf, Comparison, PairsFile, PairsPolicy, PolicyRecord
from preftune.records.reward_model import Mistake, RewardModelRecord
from preftune.records.run import DataRecord, RunRecord, SampleRow, TokenRow
from preftune.records.stage import MetricsRow, StageRecord
from preftune.report.text import clean
from preftune.rundir import BASE, policy_name

Row = Mapping[str, Any]
SFT = "policy_sft"
CHOSEN = "chosen"  # the response that the data call the better one, as a reference of comparisons


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
    outdated: tuple[str, ...] = ()  # what was measured of models that are no longer there, and is left out
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
    def second_stage(self) -> str | None:
        """The stage of the second reward model, which gave the held-out scores."""
        return next((policy.held_out_by for policy in self.policies if policy.held_out_by), None)

    @property
    def second_model(self) -> RewardModelRecord | None:
        """What was measured of the second reward model, if that is known."""
        return next((model for model in self.other_reward_models if model.stage == self.second_stage), None)

    @property
    def golds(self) -> tuple[str, ...]:
        """Names of the judges called gold, besides the world's own score."""
        return tuple(dict.fromkeys(name for policy in self.policies for name in policy.golds))

    @property
    def gold_words(self) -> str:
        """Whose score `gold` is."""
        if not self.golds or (self.data is not None and self.data.world):
            return "the world's gold score"
        return f"the gold score of {clean(self.golds[0], MAX_LABEL)}"

    @property
    def scored_by_model(self) -> bool:
        """Whether a reward model scores the policies, as far as is known."""
        return self.reward_model is not None or scored_by_model(self.config, self.policies)

    @property
    def score_words(self) -> str:
        """Whose score `score` is."""
        if self.functions is None:
            return "the reward model's own score"
        start = "the reward model's score plus" if self.scored_by_model else "the score of"
        return f"{start} {clean(self.functions, MAX_LABEL)}"

    @property
    def functions(self) -> str | None:
        """The reward functions that policies are scored by, alone or beside a reward model."""
        return setting(self.config.get("evaluation", {}), "reward_functions")

    @property
    def reference(self) -> str:
        """The policy that all others are compared with: the sft stage's, or the base model without one."""
        recorded = (row.reference for row in self.comparisons)
        measured = [policy.policy for policy in self.policies] or [policy_name(s.name) for s in self.stages]
        return next(recorded, None) or reference_in(self.config, measured)

    def label(self, policy: str) -> str:
        """What a policy is called in text."""
        if policy == CHOSEN:
            return "the chosen response"
        evaluated = self.policy(policy)
        return evaluated.label if evaluated else clean(policy, MAX_LABEL)

    def comparison(
        self, policy: str, measure: str = "score", against: str | None = None
    ) -> Comparison | None:
        """The recorded comparison of `policy` in `measure` with `against`, by default the reference."""
        reference = self.reference if against is None else against
        rows = (row for row in self.comparisons if row.policy == policy and row.measure == measure)
        return next((row for row in rows if row.reference == reference), None)


def setting(table: Row, key: str) -> str | None:
    """A setting that need not be set, for which config.toml has "none"."""
    value = table.get(key)
    return None if value in (None, "", "none") else str(value)


def reference_in(config: Row, evaluated: Collection[str]) -> str:
    """The reference by the settings: the policy of the first stage that imitates, if it was evaluated, else
    the base. Without settings that of a stage "sft".
    """
    stages = config.get("stage", {})
    if not stages:
        return SFT if SFT in evaluated else BASE
    kinds = {name: config_of(str(stage.get("algorithm"))) for name, stage in stages.items()}
    imitating = [policy_name(name) for name, kind in kinds.items() if kind is not None and kind.imitates]
    return next((policy for policy in imitating if policy in evaluated), BASE)


def scored_by_model(config: Row, policies: Collection[PolicyRecord]) -> bool:
    """Whether the settings have a reward model, or policies a score that no functions explain. True without
    settings, which would say.
    """
    stages = config.get("stage", {}).values()
    kinds = [config_of(str(stage.get("algorithm"))) for stage in stages]
    if not config or any(kind.makes == "model" and not kind.trains_policy for kind in kinds if kind):
        return True
    if any(setting(stage, "reward_model") for stage in stages):
        return True
    functions = setting(config.get("evaluation", {}), "reward_functions")
    return functions is None and any(policy.score is not None for policy in policies)

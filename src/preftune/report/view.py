"""A run as one frozen view: what was measured, typed. Every part may be missing, as in a run of one stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preftune.report.estimate import Estimate
from preftune.report.reward_model import RewardModelView
from preftune.report.text import clean
from preftune.rundir import BASE

Row = Mapping[str, Any]
SFT = "policy_sft"
CHOSEN = "chosen"  # the response that people preferred, as a reference of comparisons
MAX_LABEL = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class StageView:
    """One stage: its record and its metric rows (each with "step" and "time")."""

    name: str
    algorithm: str
    status: str
    seconds: float | None = None
    peak_memory_mb: float | None = None
    steps: int | None = None
    parents: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)  # rows that could not be encoded, by reason
    metrics: tuple[Row, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthControlled:
    """What is left of a policy's gain over the reference at equal length."""

    win_rate: Estimate | None = None
    raw_win_rate: Estimate | None = None
    gain: Estimate | None = None
    matched: Estimate | None = None  # the gain on prompts where both responses are about equally long
    surviving: Estimate | None = None  # share of the gain that is left; None where there is no gain to share
    method: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BestOf:
    """One point of the best-of-n curve: KL by formula (an upper bound), in nats, and what it gained."""

    n: int
    kl: float
    reward: Estimate | None = None
    gold: Estimate | None = None
    held_out: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyView:
    """One policy's measurements on the held-out prompts; KL is to the reference, in nats."""

    policy: str
    label: str
    n_prompts: int | None = None
    reward: Estimate | None = None
    reward_sd: float | None = None
    difference: Estimate | None = None
    win_rate: Estimate | None = None
    kl_sequence: Estimate | None = None
    kl_token: Estimate | None = None
    k1_sequence: Estimate | None = None
    k1_token: Estimate | None = None
    kl_formula: float | None = None
    length: Estimate | None = None
    length_median: float | None = None
    eos_rate: Estimate | None = None
    shares: Mapping[str, float] = field(default_factory=dict)  # empty, distinct_1, ..., role_leakage
    intervals: Mapping[str, Estimate] = field(default_factory=dict)  # the same names, where one is known
    gold: Estimate | None = None
    reverse_kl: Estimate | None = None  # KL(reference || policy), on the reference's samples
    held_out: Estimate | None = None  # score by a reward model that trained no policy
    win_rate_chosen: Estimate | None = None
    length_controlled: LengthControlled | None = None
    scores: tuple[float, ...] = ()  # one for each prompt, all prompts

    @property
    def kl(self) -> Estimate | None:
        """KL per response in nats: exact over the vocabulary, or the bound of the formula for best-of-n."""
        if self.kl_sequence is not None:
            return self.kl_sequence
        return None if self.kl_formula is None else Estimate(value=self.kl_formula)

    @property
    def best_of(self) -> bool:
        """True for best-of-n of the sft policy: a selection rule, not a trained model."""
        return self.policy.startswith("best_of_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A recorded comparison of a policy with the reference in "score" or "gold", paired by prompt.

    `p_holm` is the p-value after Holm's correction, `n_needed` the prompts to show the difference seen.
    """

    policy: str
    reference: str
    measure: str
    difference: Estimate
    p_holm: float | None = None
    n_needed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairsPolicy:
    """One policy on other pairs: how often it prefers the chosen response, by its own log-probabilities
    (against the reference's, per token), and how its samples do on their prompts.
    """

    label: str
    prefers: Estimate | None = None
    prefers_per_token: Estimate | None = None
    win_rate_chosen: Estimate | None = None
    difference: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherPairs:
    """What `evaluate --pairs FILE` found: the reward models and the policies on pairs of somebody else."""

    file: str
    n: int | None = None
    seen: int | None = None  # left out since their prompt was trained on
    reward_models: tuple[RewardModelView, ...] = ()
    policies: tuple[PairsPolicy, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunView:
    """Everything the report shows, read once."""

    name: str
    config: Row
    config_text: str
    record: Row  # run.json
    data: Row  # data.json
    stages: tuple[StageView, ...]
    policies: tuple[PolicyView, ...]
    reward_model: RewardModelView | None
    comparisons: tuple[Comparison, ...]
    samples: Mapping[str, tuple[Row, ...]]
    mistakes: tuple[Row, ...]
    missing: tuple[str, ...]
    best_of: tuple[BestOf, ...] = ()
    other_reward_models: tuple[RewardModelView, ...] = ()
    other_pairs: tuple[OtherPairs, ...] = ()
    origins: Mapping[str, str] = field(default_factory=dict)  # by dotted key: default, recipe, command line
    recipe: str = ""

    def policy(self, name: str) -> PolicyView | None:
        """The policy of that name, if it was evaluated."""
        return next((policy for policy in self.policies if policy.policy == name), None)

    @property
    def reference(self) -> str:
        """The policy that all others are compared with: the sft stage's, or the base model without one."""
        recorded = (row.reference for row in self.comparisons)
        return next(recorded, SFT if self.policy(SFT) is not None else BASE)

    def label(self, policy: str) -> str:
        """What a policy is called in text."""
        if policy == CHOSEN:
            return "the human-chosen response"
        found = self.policy(policy)
        return found.label if found else clean(policy, MAX_LABEL)

    def comparison(
        self, policy: str, measure: str = "score", against: str | None = None
    ) -> Comparison | None:
        """The recorded comparison of `policy` in `measure` with `against`, by default the reference."""
        other = self.reference if against is None else against
        rows = (row for row in self.comparisons if row.policy == policy and row.measure == measure)
        return next((row for row in rows if row.reference == other), None)

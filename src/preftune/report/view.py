"""A run as one frozen view: what was measured, typed. Every part may be missing, as in a run of one stage."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from preftune.report.text import clean, decimals_for
from preftune.rundir import BASE

Row = Mapping[str, Any]
SFT = "policy_sft"
MAX_LABEL = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval and the number of items behind it; these may be unknown."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None

    def text(self, *, sign: bool = False, scale: float = 1.0) -> str:
        """`0.41 [0.22, 0.60]`, to the digits that the interval supports."""
        plus = "+" if sign else ""
        if self.low is None or self.high is None:
            return f"{self.value * scale:{plus}.{decimals_for(abs(self.value * scale))}f}"
        digits = decimals_for((self.high - self.low) * scale / 2)
        low, high = (f"{bound * scale + 0.0:.{digits}f}" for bound in (self.low, self.high))
        return f"{self.value * scale:{plus}.{digits}f} [{low}, {high}]"

    def percent(self) -> str:
        """The same for a share: `71.0 % [68.1, 73.7]`."""
        if self.low is None or self.high is None:
            return f"{100 * self.value:.1f} %"
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def excludes(self, value: float) -> bool:
        """True if the interval is known and `value` lies outside of it."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


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
class PolicyView:
    """One policy's measurements on the held-out prompts; KL is to the reference, in nats."""

    policy: str
    label: str
    n_prompts: int | None = None
    n_samples: int | None = None
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
    gold: Estimate | None = None

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
class RewardModelView:
    """The reward model on held-out pairs. Shares are in [0, 1]; margins and scores are raw."""

    n: int | None = None
    accuracy: Estimate | None = None
    ties: int | None = None
    accuracy_ties_half: float | None = None
    mean_margin: float | None = None
    brier: float | None = None
    ece: float | None = None
    by_source: Mapping[str, Estimate] = field(default_factory=dict)
    by_length: Mapping[str, Estimate] = field(default_factory=dict)
    baselines: Mapping[str, Estimate] = field(default_factory=dict)
    correlation_score_length: float | None = None
    margin_edges: tuple[float, ...] = ()
    margin_counts: tuple[float, ...] = ()
    score: Mapping[str, float] = field(default_factory=dict)
    best_reachable: float | None = None
    gold_parts: Mapping[str, Estimate] = field(default_factory=dict)  # accuracy where that part alone differs
    gold_gaps: Mapping[str, float] = field(
        default_factory=dict
    )  # and the mean margin there, in sd of the scores


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
        found = self.policy(policy)
        return found.label if found else clean(policy, MAX_LABEL)

    def paired(self, policy: str, reference: str) -> Comparison | None:
        """The recorded comparison of two policies in reward."""
        rows = (row for row in self.comparisons if row.policy == policy and row.measure == "score")
        return next((row for row in rows if row.reference == reference), None)

    def comparison(self, policy: str, measure: str = "score") -> Comparison | None:
        """The recorded comparison of `policy` with the reference in `measure`."""
        rows = (row for row in self.comparisons if row.policy == policy and row.measure == measure)
        return next(rows, None)

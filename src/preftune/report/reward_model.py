"""The reward model's audit as frozen views: what it was measured at, typed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from preftune.report.estimate import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineTest:
    """The reward model against a baseline on the same pairs: accuracy minus the baseline's, in shares."""

    baseline: str
    difference: Estimate
    p_holm: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReliabilityBin:
    """Pairs whose confidence lies in [low, high): how confident it was, and how often it was right."""

    low: float
    high: float
    n: int
    confidence: float | None = None
    accuracy: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthBin:
    """Responses of about one length, `length` tokens in the mean: the mean raw score of either side."""

    length: float
    chosen: Estimate | None = None
    rejected: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SanityRow:
    """Raw scores of one kind of response to the same prompts; how often they are below the chosen one's."""

    name: str
    label: str
    score: Estimate | None = None
    below_chosen: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Temperature:
    """The best temperature; negative log-likelihoods in nats per pair, `after` is cross-fitted. `gain` is
    before minus after, paired; earlier runs have none.
    """

    value: float
    before: float | None = None
    after: float | None = None
    gain: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Invariance:
    """Largest change of a raw score by padding and by batch; `ok` where both stay within `tolerance`."""

    padding: float | None = None
    batch: float | None = None
    tolerance: float | None = None
    ok: bool | None = None
    n: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """The accuracy that others reached with such a model on such data; no bounds where none is known."""

    text: str
    low: float | None = None
    high: float | None = None
    source: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Power:
    """What so many pairs can show: the smallest accuracy told from chance 4 times in 5, and pairs needed."""

    n: int | None = None
    detectable: float | None = None
    n_needed: int | None = None
    baseline: str = ""
    n_needed_baseline: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TagCount:
    """One kind of pair: how common among mistakes and among all pairs, and how often a mistake."""

    mistakes: int
    share: float | None = None
    share_of_pairs: float | None = None
    error_rate: Estimate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardModelView:
    """The reward model on held-out pairs. Shares are in [0, 1]; margins and scores are raw."""

    n: int | None = None
    accuracy: Estimate | None = None
    ties: int | None = None
    accuracy_ties_half: Estimate | None = None
    mean_margin: Estimate | None = None
    brier: Estimate | None = None
    ece: float | None = None
    ece_if_calibrated: float | None = None  # what chance alone would make of it, 19 times in 20 at most
    by_source: Mapping[str, Estimate] = field(default_factory=dict)
    by_length: Mapping[str, Estimate] = field(default_factory=dict)
    baselines: Mapping[str, Estimate] = field(default_factory=dict)
    correlation_score_length: Estimate | None = None
    margin_edges: tuple[float, ...] = ()
    margin_counts: tuple[float, ...] = ()
    score: Mapping[str, float] = field(default_factory=dict)
    best_reachable: float | None = None
    gold_parts: Mapping[str, Estimate] = field(default_factory=dict)  # accuracy where that part alone differs
    gold_gaps: Mapping[str, float] = field(default_factory=dict)  # the mean margin there, in sd of the scores
    stage: str = ""
    held_out: bool = False  # trained on no pair that the judge of this run was trained on
    by_length_difference: Mapping[str, Estimate] = field(default_factory=dict)
    by_turns: Mapping[str, Estimate] = field(default_factory=dict)
    baseline_tests: tuple[BaselineTest, ...] = ()
    reliability: tuple[ReliabilityBin, ...] = ()
    temperature: Temperature | None = None
    score_by_length: tuple[LengthBin, ...] = ()
    sanity: tuple[SanityRow, ...] = ()
    invariance: Invariance | None = None
    band: Band | None = None
    power: Power | None = None
    tags: Mapping[str, TagCount] = field(default_factory=dict)

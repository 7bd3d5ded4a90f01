"""evaluation/reward_model*.json: a reward model on held-out pairs. Shares lie in [0, 1]; scores are raw."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from preftune.records.base import (
    Estimate,
    Estimates,
    Measured,
    Number,
    Numbers,
    Record,
    Several,
    _or_none,
    at,
)

_BESIDE = ("accuracy_ties_half", "mean_margin", "brier", "correlation_score_length")


def _estimate(row: Any, key: str) -> Any:
    """{key: number, "interval": ..., "n": ...} with the number as an estimate."""
    if not isinstance(row, Mapping) or isinstance(row.get(key), Estimate) or row.get(key) is None:
        return row
    return {**row, key: {"value": row[key], "interval": row.get("interval"), "n": row.get("n")}}


class BaselineTest(Record):
    """The reward model against a baseline on the same pairs: accuracy minus the baseline's, in shares."""

    baseline: str
    difference: Estimate
    p_holm: Number | None = None

    _fold = model_validator(mode="before")(lambda row: _estimate(row, "difference"))


class ReliabilityBin(Record):
    """Pairs whose confidence lies in [low, high): how confident it was, and how often it was right."""

    low: Number
    high: Number
    n: int
    confidence: Number | None = None
    accuracy: Measured = None

    _fold = model_validator(mode="before")(lambda row: _estimate(row, "accuracy"))


class LengthBin(Record):
    """Responses of about one length, `length` tokens in the mean: the mean raw score of either side."""

    length: Number
    chosen: Measured = None
    rejected: Measured = None


class SanityRow(Record):
    """Raw scores of one kind of response to the same prompts; how often they are below the chosen one's."""

    name: str
    label: str = ""
    score: Measured = None
    below_chosen: Measured = None

    @model_validator(mode="before")
    @classmethod
    def _fold_score(cls, row: Any) -> Any:
        if not isinstance(row, Mapping):
            return row
        score = {key: row[key] for key in ("mean", "value", "interval", "n") if key in row}
        label = row.get("label") or row.get("name")
        if isinstance(label, str):
            label = label.removesuffix(" by people")  # of older evaluations, whoever had chosen
        return {"score": score, **row, "label": label}


class Temperature(Record):
    """The best temperature; negative log-likelihoods in nats per pair, `after` is cross-fitted. `gain` is
    before minus after, paired; earlier runs have none.
    """

    value: Number
    before: Number | None = at("nll_before")
    after: Number | None = at("nll_after")
    gain: Measured = at("nll_gain")


class Invariance(Record):
    """Largest change of a raw score by padding and by batch; `ok` where both stay within `tolerance`."""

    padding: Number | None = at("padding_max_difference")
    batch: Number | None = at("batch_max_difference")
    tolerance: Number | None = None
    ok: bool | None = None
    n: int | None = None


class Band(Record):
    """The accuracy that others reached with such a model on such data; no bounds where none is known."""

    text: str
    low: Number | None = None
    high: Number | None = None
    source: str = ""


class Power(Record):
    """What so many pairs can show: the smallest accuracy found to differ from chance 4 times in 5; pairs
    needed.
    """

    n: int | None = at("chance", "n")
    detectable: Number | None = at("chance", "detectable")
    n_needed: int | None = at("chance", "n_needed")
    baseline_name: str | None = at("baseline", "name")
    n_needed_baseline: int | None = at("baseline", "n_needed")


class TagCount(Record):
    """One kind of pair: how common among mistakes and among all pairs, and how often a mistake."""

    mistakes: int
    share: Number | None = None
    share_of_pairs: Number | None = None
    error_rate: Measured = None


def _labelled(rows: Any) -> Any:
    """[{"label": ..., ...}] by label."""
    if not isinstance(rows, list | tuple) or not all(isinstance(row, Mapping) for row in rows):
        return rows
    return {row.get("label"): row for row in rows}


def _no_text(row: Any) -> Any:
    return None if isinstance(row, Mapping) and not row.get("text") else row


class RewardModelRecord(Record):
    """The whole measurement of one reward model."""

    stage: str = ""
    held_out: bool | None = None  # trained on no prompt that the judge was trained on; None: not known
    n: int | None = None
    accuracy: Measured = None
    ties: int | None = None
    left_out: Mapping[str, int] = Field(default_factory=dict)  # pairs that could not be encoded, by reason
    accuracy_ties_half: Measured = None
    mean_margin: Measured = None
    brier: Measured = None
    ece: Number | None = None
    ece_if_calibrated: Number | None = None  # what chance alone would make of it, 19 times in 20 at most
    by_source: Estimates = Field(default_factory=dict)
    by_length: Estimates = Field(default_factory=dict)
    by_length_difference: Annotated[Estimates, BeforeValidator(_labelled)] = Field(default_factory=dict)
    by_turns: Estimates = Field(default_factory=dict)
    baselines: Estimates = Field(default_factory=dict)
    baseline_tests: Several[BaselineTest] = ()
    correlation_score_length: Measured = None
    margin_edges: Several[Number] = at("margins_histogram", "edges", default=())
    margin_counts: Several[Number] = at("margins_histogram", "counts", default=())
    score: Numbers = Field(default_factory=dict)
    best_reachable: Number | None = None
    gold_parts: Estimates = at("gold_component_gaps", default={})  # pairs where it alone differs
    gold_gaps: Numbers = Field(default_factory=dict)  # the mean margin there, in sd of the scores
    reliability: Several[ReliabilityBin] = ()
    temperature: Annotated[Temperature | None, BeforeValidator(_or_none)] = None
    score_by_length: Several[LengthBin] = ()
    sanity: Several[SanityRow] = ()
    invariance: Invariance | None = None
    band: Annotated[Band | None, BeforeValidator(_no_text)] = at("expected_band")
    power: Power | None = None
    members: Estimates = Field(default_factory=dict)  # of an ensemble: each one's accuracy
    unanimous: Measured = None  # accuracy on the pairs on which all of them agree
    disagreement: Measured = None  # sd of the margin among them
    combine: str = ""
    tags: Mapping[str, TagCount] = at("mistake_tags", default={})

    @model_validator(mode="before")
    @classmethod
    def _gather_estimates(cls, row: Any) -> Any:
        """Numbers with an interval beside them become estimates; gaps are taken out of the gold parts."""
        if not isinstance(row, Mapping):
            return row
        row = dict(row)
        for key in _BESIDE:
            if row.get(key) is not None and not isinstance(row[key], Mapping | Estimate):
                row[key] = {"value": row[key], "interval": row.get(f"{key}_interval"), "n": row.get("n")}
        parts = row.get("gold_component_gaps")
        if isinstance(parts, Mapping):
            gaps = {name: gap.get("gap_sd") for name, gap in parts.items() if isinstance(gap, Mapping)}
            row.setdefault("gold_gaps", {name: gap for name, gap in gaps.items() if gap is not None})
        return row


Token = Annotated[tuple[str, Number | None], Field(strict=False)]  # its text, and the raw score after it


class Mistake(Record):
    """A row of analysis/reward_model_mistakes.jsonl: a pair whose rejected response scores no lower."""

    idx: int
    prompt: str = ""
    chosen: str = ""
    rejected: str = ""
    reward_chosen: Number | None = None
    reward_rejected: Number | None = None
    margin: Number | None = None
    confidence: Number | None = None  # sigmoid(|margin|)
    length_chosen: int | None = None
    length_rejected: int | None = None
    turns: int | None = None
    source: str = ""
    tags: Several[str] = ()
    tokens_chosen: Several[Token] = ()
    tokens_rejected: Several[Token] = ()

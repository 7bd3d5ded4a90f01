"""evaluation/reward_model*.json as a view. As in `parse`, keys may be missing; nothing here reads a file."""

from typing import Any

from preftune.report.parse import estimate_of, estimates_of, number_of, numbers_of
from preftune.report.reward_model import (
    Band,
    BaselineTest,
    Invariance,
    LengthBin,
    Power,
    ReliabilityBin,
    RewardModelView,
    SanityRow,
    TagCount,
    Temperature,
)
from preftune.report.view import Row


def reward_model_view(row: Row) -> RewardModelView:
    """The whole audit of one reward model."""
    histogram, parts = row.get("margins_histogram") or {}, row.get("gold_component_gaps") or {}
    return RewardModelView(
        n=row.get("n"),
        accuracy=estimate_of(row.get("accuracy")),
        ties=row.get("ties"),
        accuracy_ties_half=_beside(row, "accuracy_ties_half"),
        mean_margin=_beside(row, "mean_margin"),
        brier=_beside(row, "brier"),
        ece=number_of(row.get("ece")),
        ece_if_calibrated=number_of(row.get("ece_if_calibrated")),
        by_source=estimates_of(row.get("by_source")),
        by_length=estimates_of(row.get("by_length")),
        by_length_difference=_by_label(row.get("by_length_difference")),
        by_turns=estimates_of(row.get("by_turns")),
        baselines=estimates_of(row.get("baselines")),
        baseline_tests=tuple(_baseline_tests(row.get("baseline_tests"))),
        correlation_score_length=_beside(row, "correlation_score_length"),
        margin_edges=tuple(float(edge) for edge in histogram.get("edges", ())),
        margin_counts=tuple(float(count) for count in histogram.get("counts", ())),
        score=numbers_of(row.get("score")),
        best_reachable=number_of(row.get("best_reachable")),
        gold_parts=estimates_of(parts),
        gold_gaps=numbers_of({part: gap.get("gap_sd") for part, gap in parts.items()}),
        stage=str(row.get("stage") or ""),
        held_out=row.get("held_out") is True,
        reliability=tuple(_bin(part) for part in row.get("reliability") or ()),
        temperature=_temperature(row.get("temperature")),
        score_by_length=tuple(_length_bin(part) for part in row.get("score_by_length") or ()),
        sanity=tuple(_sanity(part) for part in row.get("sanity") or ()),
        invariance=_invariance(row.get("invariance")),
        band=_band(row.get("expected_band")),
        power=_power(row.get("power")),
        tags={str(tag): _tag(counts) for tag, counts in (row.get("mistake_tags") or {}).items()},
    )


def _beside(row: Row, key: str) -> Any:
    """A number whose interval stands beside it under `<key>_interval`."""
    if row.get(key) is None:
        return None
    return estimate_of({"value": row[key], "interval": row.get(f"{key}_interval"), "n": row.get("n")})


def _by_label(groups: Any) -> dict[str, Any]:
    return estimates_of({str(group["label"]): group for group in groups or ()})


def _baseline_tests(rows: Any) -> list[BaselineTest]:
    found = []
    for row in rows or ():
        difference = estimate_of(
            {"mean": row.get("difference"), "interval": row.get("interval"), "n": row.get("n")}
        )
        if difference is not None:
            p_holm = number_of(row.get("p_holm"))
            found.append(BaselineTest(baseline=str(row["baseline"]), difference=difference, p_holm=p_holm))
    return found


def _bin(row: Row) -> ReliabilityBin:
    accuracy = estimate_of({"value": row.get("accuracy"), "interval": row.get("interval"), "n": row["n"]})
    low, high = float(row["low"]), float(row["high"])
    confidence = number_of(row.get("confidence"))
    return ReliabilityBin(low=low, high=high, n=int(row["n"]), confidence=confidence, accuracy=accuracy)


def _length_bin(row: Row) -> LengthBin:
    sides = (estimate_of(row.get("chosen")), estimate_of(row.get("rejected")))
    return LengthBin(length=float(row["length"]), chosen=sides[0], rejected=sides[1])


def _temperature(row: Any) -> Temperature | None:
    value = None if not row else number_of(row.get("value"))
    if value is None:
        return None
    return Temperature(
        value=value,
        before=number_of(row.get("nll_before")),
        after=number_of(row.get("nll_after")),
        gain=estimate_of(row.get("nll_gain")),
    )


def _sanity(row: Row) -> SanityRow:
    return SanityRow(
        name=str(row["name"]),
        label=str(row.get("label") or row["name"]),
        score=estimate_of(row),
        below_chosen=estimate_of(row.get("below_chosen")),
    )


def _invariance(row: Any) -> Invariance | None:
    if not row:
        return None
    return Invariance(
        padding=number_of(row.get("padding_max_difference")),
        batch=number_of(row.get("batch_max_difference")),
        tolerance=number_of(row.get("tolerance")),
        ok=row.get("ok"),
        n=row.get("n"),
    )


def _band(row: Any) -> Band | None:
    if not row or not row.get("text"):
        return None
    return Band(
        text=str(row["text"]),
        low=number_of(row.get("low")),
        high=number_of(row.get("high")),
        source=str(row.get("source") or ""),
    )


def _power(row: Any) -> Power | None:
    if not row:
        return None
    chance, baseline = row.get("chance") or {}, row.get("baseline") or {}
    return Power(
        n=chance.get("n"),
        detectable=number_of(chance.get("detectable")),
        n_needed=chance.get("n_needed"),
        baseline=str(baseline.get("name") or ""),
        n_needed_baseline=baseline.get("n_needed"),
    )


def _tag(row: Row) -> TagCount:
    return TagCount(
        mistakes=int(row["mistakes"]),
        share=number_of(row.get("share")),
        share_of_pairs=number_of(row.get("share_of_pairs")),
        error_rate=estimate_of(row.get("error_rate")),
    )

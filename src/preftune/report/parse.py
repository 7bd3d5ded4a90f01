"""The records of evaluation/ as views. Keys may be missing, as in runs of earlier versions: then it is None.

Nothing here reads a file; a value of a wrong type raises TypeError, ValueError, KeyError or AttributeError,
which `load` turns into an error that names the file.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from preftune.report.estimate import Estimate
from preftune.report.text import clean
from preftune.report.view import (
    MAX_LABEL,
    BestOf,
    Comparison,
    LengthControlled,
    OtherPairs,
    PairsPolicy,
    PolicyView,
    Row,
)

SHARES = ("empty_share", "role_leakage", "repetition_4", "distinct_1", "distinct_2")
WITH_INTERVAL = {"empty": "empty_share", "role_leakage_rate": "role_leakage", "repetition": "repetition_4"}


def number_of(value: Any) -> float | None:
    """A finite or non-finite number; rundir writes the non-finite ones as text."""
    return None if value is None else float(value)


def numbers_of(row: Row | None) -> dict[str, float]:
    return {str(key): float(value) for key, value in (row or {}).items() if value is not None}


def estimate_of(row: Any) -> Estimate | None:
    """{"mean" or "value", "interval": [low, high], "n"} as an Estimate; a bare number has no interval."""
    if row is None:
        return None
    if not isinstance(row, Mapping):
        return Estimate(value=float(row))
    value = number_of(row.get("mean", row.get("value")))
    if value is None:
        return None
    low, high = row.get("interval") or (None, None)
    n = row.get("n")
    return Estimate(value=value, low=_bound(low), high=_bound(high), n=None if n is None else int(n))


def _bound(value: Any) -> float | None:
    """An end of an interval; one that is not finite supports no claim and counts as unknown."""
    number = number_of(value)
    return number if number is not None and math.isfinite(number) else None


def estimates_of(row: Any) -> dict[str, Estimate]:
    found = {str(key): estimate_of(value) for key, value in (row or {}).items()}
    return {key: value for key, value in found.items() if value is not None}


def policy_view(row: Row) -> PolicyView:
    reward, difference = row.get("reward") or {}, row.get("reward_difference_to_sft") or {}
    kl, length = row.get("kl") or {}, row.get("length") or {}
    policy = str(row["policy"])
    return PolicyView(
        policy=policy,
        label=clean(row.get("label") or policy, MAX_LABEL),
        n_prompts=row.get("n_prompts"),
        reward=estimate_of(reward or None),
        reward_sd=number_of(reward.get("sd")),
        difference=estimate_of(difference or None),
        win_rate=estimate_of(row.get("win_rate_vs_sft")),
        kl_sequence=estimate_of(kl.get("exact_per_sequence")),
        kl_token=estimate_of(kl.get("exact_per_token")),
        k1_sequence=estimate_of(kl.get("k1_per_sequence")),
        k1_token=estimate_of(kl.get("k1_per_token")),
        kl_formula=number_of(kl.get("formula")),
        length=estimate_of(length or None),
        length_median=number_of(length.get("median")),
        eos_rate=estimate_of(row.get("eos_rate")),
        shares=numbers_of({key: row.get(key) for key in SHARES}),
        intervals=estimates_of({old: row.get(new) for new, old in WITH_INTERVAL.items()}),
        gold=estimate_of(row.get("gold")),
        reverse_kl=estimate_of(kl.get("reverse_per_sequence")),
        held_out=estimate_of(row.get("held_out_reward")),
        win_rate_chosen=estimate_of(row.get("win_rate_vs_chosen")),
        length_controlled=_length_controlled(row.get("length_controlled")),
        scores=tuple(_finite(prompt.get("score") for prompt in row.get("prompts") or ())),
    )


def pairs_policy_view(row: Row) -> PairsPolicy:
    """A policy's record of `evaluate --pairs`."""
    own, opinion = policy_view(row), row.get("preference") or {}
    return PairsPolicy(
        label=own.label,
        prefers=estimate_of(opinion.get("accuracy")),
        prefers_per_token=estimate_of(opinion.get("accuracy_logprob_per_token")),
        win_rate_chosen=own.win_rate_chosen,
        difference=own.difference,
    )


def other_pairs_view(row: Row) -> OtherPairs:
    """pairs.json: which file, and how many of its pairs; the rest of its directory is not in it."""
    counts = [None if row.get(key) is None else int(row[key]) for key in ("n", "seen_in_training")]
    return OtherPairs(file=str(row.get("file") or "?"), n=counts[0], seen=counts[1])


def _finite(values: Iterable[Any]) -> Iterator[float]:
    for value in values:
        number = number_of(value)
        if number is not None and math.isfinite(number):
            yield number


def _length_controlled(row: Row | None) -> LengthControlled | None:
    if not row:
        return None
    return LengthControlled(
        win_rate=estimate_of(row.get("win_rate")),
        raw_win_rate=estimate_of(row.get("raw_win_rate")),
        gain=estimate_of(row.get("gain")),
        matched=estimate_of(row.get("gain_length_matched")),
        surviving=estimate_of(row.get("share_surviving")),
        method=str(row.get("method") or ""),
        source=str(row.get("source") or ""),
    )


def best_of_views(row: Row) -> tuple[BestOf, ...]:
    """The best-of-n curve by n; empty where there is none."""
    points = [
        BestOf(
            n=int(point["n"]),
            kl=float(point["kl_formula"]),
            reward=estimate_of(point.get("reward")),
            gold=estimate_of(point.get("gold")),
            held_out=estimate_of(point.get("held_out")),
        )
        for point in row.get("curve") or ()
    ]
    return tuple(sorted(points, key=lambda point: point.n))


def comparison_view(row: Row) -> Comparison:
    difference = estimate_of(row)
    if difference is None:
        raise ValueError("a comparison without a mean")
    return Comparison(
        policy=str(row["policy"]),
        reference=str(row["reference"]),
        measure=str(row["measure"]),
        difference=difference,
        p_holm=number_of(row.get("p_holm")),
        n_needed=row.get("n_needed"),
    )

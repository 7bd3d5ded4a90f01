"""Over-optimisation: gold and score against √KL for a swept setting and for best-of-n, and the laws of Gao et
al. (arXiv:2210.10760) fitted to both.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from preftune.evaluation.laws import FORMULAS, LEAST_POINTS, Kind, Law, fit_law
from preftune.study.design import Design


def sweep_records(design: Design, study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The part of study.json about sweeps, one after the other. `study` is what `pool` returned."""
    return [_record(key, values, study) for key, values in design.sweeps.items()]


def sweeps_of(study: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The records of study.json about swept settings, in the order of the command."""
    return [study["sweep"], *study.get("more_sweeps", [])] if study["sweep"] else []


def _record(key: str, stages: Mapping[str, str], study: Mapping[str, Any]) -> dict[str, Any]:
    points = [
        {"value": value, "stage": stage, "seed": seed["seed"], **_point(seed["policies"][stage])}
        for value, stage in stages.items()
        for seed in study["seeds"]
        if seed["policies"][stage]["kl"] is not None  # else it has no place on the axis
    ]
    means = [
        {"value": value, "stage": stage, **_mean(study["policies"][stage])} for value, stage in stages.items()
    ]
    best = [{"n": point["n"], **_mean(point)} for point in study["best_of_n"]]
    return {
        "key": key,
        "points": points,
        "means": means,
        "best_of_n": best,
        "laws": {
            "rl_gold": _law("rl", points, "gold_gain"),
            "rl_score": _law("rl", points, "score_gain"),
            "bon_gold": _law("best_of_n", best, "gold_gain"),
            "bon_score": _law("best_of_n", best, "score_gain"),
        },
    }


def _point(numbers: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("gold_gain", "score_gain", "kl", "eos_rate", "length", "collapsed")
    return {**{key: numbers[key] for key in keys}, "sqrt_kl": _root(numbers["kl"])}


def _mean(numbers: Mapping[str, Any]) -> dict[str, Any]:
    gains = (f"{gain}{end}" for gain in ("gold_gain", "score_gain") for end in ("", "_low", "_high"))
    means = {key: numbers[key] for key in ("kl", "eos_rate", "length", *gains)}
    return {**means, "sqrt_kl": _root(numbers["kl"])}


def _root(kl: float | None) -> float | None:
    return None if kl is None else math.sqrt(max(kl, 0.0))


def _law(kind: Kind, points: Sequence[Mapping[str, Any]], gain: str) -> dict[str, Any] | None:
    """Fitted to one point a seed and value (RL), or one a size n, pooled over seeds (best-of-n). None where
    training gave fewer than two points for each of the law's two coefficients.
    """
    measured = [point for point in points if point[gain] is not None]
    if kind == "rl" and len(measured) < LEAST_POINTS:
        return None
    seeds = [point["seed"] for point in measured] if kind == "rl" else None
    fitted = fit_law(kind, [p["sqrt_kl"] for p in measured], [p[gain] for p in measured], seeds)
    return None if fitted is None else as_record(fitted)


def as_record(law: Law) -> dict[str, Any]:
    """A law for JSON, with its formula and where it bends down."""
    return {**asdict(law), "law": FORMULAS[law.kind], "peak_sqrt_kl": law.peak}


def from_record(record: Mapping[str, Any]) -> Law:
    """The law of `as_record`, for drawing it."""
    numbers = {key: float(record[key]) for key in ("alpha", "beta", "alpha_se", "beta_se", "r2")}
    return Law(kind=record["kind"], n=record["n"], errors=record["errors"], **numbers)

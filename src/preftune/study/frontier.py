"""Gold at the same distance from SFT, method by method: the frontier of Rafailov et al. (arXiv:2305.18290,
figure 2), with exact KL and intervals over seeds and prompts.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from preftune.evaluation.pooled import pooled_gain
from preftune.evaluation.stats import Floats
from preftune.study.cells import interval
from preftune.study.design import Design
from preftune.study.values import COLUMNS, SeedValues, at_distance, best_at_kl

LEVELS = (1.0, 2.5, 5.0, 10.0)  # nats a reply
LEAST_VALUES = 2  # that a method was trained at


def frontier(seeds: Sequence[SeedValues], design: Design, kind: str, resamples: int) -> list[dict[str, Any]]:
    """One row for each swept setting and one for best-of-n: the gain in gold at each level of KL, or None
    outside the range that a seed was swept over. Empty without a sweep.
    """
    rows = []
    for key, stages in design.sweeps.items():
        names = list(dict.fromkeys(stages.values()))
        if len(names) >= LEAST_VALUES:
            points = [_points(values, names, kind) for values in seeds]
            gains = [[at_distance(seed_points, kl**0.5) for seed_points in points] for kl in LEVELS]
            label = design.config.stage[names[0]].label
            rows.append({"method": label, "setting": key, "at": [_pooled_gain(g, resamples) for g in gains]})
    if rows:
        best = [[_best(values, kind, kl) for values in seeds] for kl in LEVELS]
        rows.append({"method": "best-of-n", "setting": "n", "at": [_pooled_gain(g, resamples) for g in best]})
    return rows


def _points(values: SeedValues, names: Sequence[str], kind: str) -> list[tuple[float, Floats]]:
    """(√KL, gain in gold by prompt) of every value whose KL is known, nearest first. SFT is none of them: on
    the way from there a method need not gain as a straight line does.
    """
    tables = [values.tables[name][kind] for name in names]
    kl, gain = COLUMNS.index("kl"), COLUMNS.index("gold_gain")
    points = [(max(float(table[:, kl].mean()), 0.0) ** 0.5, table[:, gain]) for table in tables]
    return sorted((point for point in points if point[0] >= 0), key=lambda point: point[0])


def _best(values: SeedValues, kind: str, kl: float) -> Floats | None:
    gold = best_at_kl(values, kind, kl)
    table = values.tables[values.facts.reference][kind]
    return None if gold is None else gold - table[:, COLUMNS.index("gold")]


def _pooled_gain(gains: Sequence[Floats | None], resamples: int) -> dict[str, Any] | None:
    reached = [gain for gain in gains if gain is not None]
    if len(reached) < len(gains):
        return None
    gain = pooled_gain(reached, resamples)
    names = {"gain": "value", "gain_low": "low", "gain_high": "high", "verdict": "verdict"}
    return {name: gain[key] for name, key in names.items()}


def section(study: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table in STUDY.md."""
    heads = ["method", "swept", *(f"gold gain at {kl:g} nats" for kl in LEVELS)]
    rows = study.get("frontier", [])
    gains = [[interval(at, "gain", sign=True) for at in row["at"]] for row in rows]
    return heads, [[row["method"], row["setting"], *cells] for row, cells in zip(rows, gains, strict=True)]

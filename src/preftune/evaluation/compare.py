"""Every policy against SFT, paired by prompt. Verdicts come from Holm-corrected tests and intervals only."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from preftune.config import EvaluationConfig
from preftune.evaluation import stats

ALPHA = 0.05


def compare_to(
    reference: str, rows: Mapping[str, Sequence[Mapping[str, Any]]], settings: EvaluationConfig, seed: int
) -> list[dict[str, Any]]:
    """One record per policy and measure ("score", and "gold" where it is known); Holm within each measure."""
    measures = [m for m in ("score", "gold") if rows[reference] and rows[reference][0].get(m) is not None]
    records = []
    for measure in measures:
        family = [
            _paired(name, reference, measure, rows, settings, seed) for name in rows if name != reference
        ]
        for record, adjusted in zip(family, stats.holm([r["p_value"] for r in family]), strict=True):
            records.append({**record, "p_holm": adjusted, "verdict": _verdict(record, adjusted)})
    return records


def _paired(
    name: str,
    reference: str,
    measure: str,
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: EvaluationConfig,
    seed: int,
) -> dict[str, Any]:
    a, b = ([row[measure] for row in rows[policy]] for policy in (name, reference))
    result = stats.paired_bootstrap(a, b, settings.resamples, seed)
    rate, n = stats.win_rate(a, b), len(a)
    return {
        "policy": name,
        "reference": reference,
        "measure": measure,
        "n": n,
        "mean": result.mean,
        "interval": list(result.interval),
        "p_value": result.p_value,
        "win_rate": {"value": rate, "interval": list(stats.wilson(rate * n, n)), "n": n},
        "n_needed": _n_needed(a, b),
    }


def _verdict(record: Mapping[str, Any], adjusted: float) -> str:
    """Better or worse only if the interval excludes 0 and the adjusted p-value is below 0.05."""
    low, high = record["interval"]
    if adjusted >= ALPHA or low <= 0 <= high:
        return "no detectable difference"
    return "better" if low > 0 else "worse"


def _n_needed(a: Sequence[float], b: Sequence[float]) -> int | None:
    """Prompts needed to see the observed mean with 80% power at two-sided 5%: ((1.96 + 0.84) sd / mean)²."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    if len(difference) < 2 or difference.mean() == 0:
        return None
    n = ((1.959964 + 0.841621) * difference.std(ddof=1) / difference.mean()) ** 2
    return int(min(np.ceil(n), 10**9))

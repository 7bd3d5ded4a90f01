"""Every policy against SFT, best-of-n and the chosen response, paired by prompt. Verdicts come from
Holm-corrected tests and intervals only.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from preftune.config import EvaluationConfig
from preftune.evaluation import stats
from preftune.records.verdict import outcome

MEASURES = ("score", "gold", "held_out")
Rows = Sequence[Mapping[str, Any]]


def compare_to(
    reference: str, rows: Mapping[str, Rows], settings: EvaluationConfig, seed: int
) -> list[dict[str, Any]]:
    """One record per policy and measure (score, gold and held-out score, further golds: what is known).

    Holm's correction is over the policies that are compared with one reference in one measure: `family`.
    """
    records = []
    named = dict.fromkeys(key for row in rows[reference] for key in row if key.startswith("gold:"))
    for measure in (*MEASURES, *named):
        if all(row.get(measure) is None for row in rows[reference]):
            continue
        contestants = [name for name in rows if name != reference]
        family = [_paired_comparison(name, reference, measure, rows, settings, seed) for name in contestants]
        records += judged([record for record in family if record is not None], f"{measure} vs {reference}")
    return records


def judged(records: Sequence[dict[str, Any]], family: str) -> Iterator[dict[str, Any]]:
    """The records with Holm's adjusted p-value over all of them, a verdict, and the name of the family."""
    adjusted = stats.holm([record["p_value"] for record in records])
    for record, p in zip(records, adjusted, strict=True):
        low, high = record["interval"]
        verdict = outcome(low, high, record["n"], p)
        yield {**record, "p_holm": p, "verdict": verdict, "family": family}


def _paired_comparison(
    name: str,
    reference: str,
    measure: str,
    rows: Mapping[str, Rows],
    settings: EvaluationConfig,
    seed: int,
) -> dict[str, Any] | None:
    """One comparison over the prompts on which both are known; None where there is none."""
    numbers = paired(rows[name], rows[reference], measure, settings, seed)
    return numbers and {"policy": name, "reference": reference, "measure": measure, **numbers}


def paired(
    rows: Rows, reference: Rows, measure: str, settings: EvaluationConfig, seed: int
) -> dict[str, Any] | None:
    """The difference in one measure over the prompts on which both are known; None where there is none."""
    value_pairs = [
        (row[measure], base[measure])
        for row, base in zip(rows, reference, strict=True)
        if row.get(measure) is not None and base.get(measure) is not None
    ]
    if not value_pairs:
        return None
    a, b = zip(*value_pairs, strict=True)
    result = stats.paired_bootstrap(a, b, settings.resamples, seed)
    return {
        "n": len(a),
        "mean": result.mean,
        "interval": list(result.interval),
        "p_value": result.p_value,
        "win_rate": stats.beats(a, b),
        "n_needed": stats.number_needed(np.subtract(a, b)),
    }

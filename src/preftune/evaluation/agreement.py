"""Do several raters mean the same?"""

from collections.abc import Hashable, Sequence

import numpy as np

from preftune.evaluation.stats import Floats, Interval, bootstrap_statistic


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's α for names (nominal data): 1 is agreement, 0 is what chance gives, below 0 is worse.

    A unit is the judgements of one item, by any raters; those with fewer than two say nothing. With o_ck the
    pairs of values in units, each unit's weighted by 1 / (its judgements - 1), and n_c their sums,
    α = 1 - (n - 1) Σ_{c≠k} o_ck / Σ_{c≠k} n_c n_k (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability", section C). None where there is nothing to agree on: no pair, or one value alone.
    """
    alpha = _alpha(_counts(units))
    return None if np.isnan(alpha) else alpha


def alpha_interval(units: Sequence[Sequence[Hashable]], resamples: int = 2000, seed: int = 0) -> Interval:
    """Percentile bootstrap over units of `krippendorff_alpha`. ValueError: no unit of two judgements."""
    counts = _counts(units)
    return bootstrap_statistic(lambda rows: _alpha(counts[rows]), len(counts), resamples, seed)


def _counts(units: Sequence[Sequence[Hashable]]) -> Floats:
    """How often each value was given to each unit of two judgements or more: (units, values)."""
    several = [list(unit) for unit in units if len(unit) > 1]
    values = list(dict.fromkeys(value for unit in several for value in unit))
    return np.array([[float(unit.count(value)) for value in values] for unit in several]).reshape(
        len(several), len(values)
    )


def _alpha(counts: Floats) -> float:
    ratings, totals = counts.sum(1), counts.sum(0)
    n = totals.sum()
    expected = n * n - (totals**2).sum()
    apart = ((ratings * ratings - (counts**2).sum(1)) / (ratings - 1)).sum()
    return float(1 - (n - 1) * apart / expected) if expected else float("nan")

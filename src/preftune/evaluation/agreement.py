"""Do several raters mean the same?"""

from collections import Counter
from collections.abc import Hashable, Sequence


def krippendorff_alpha(units: Sequence[Sequence[Hashable]]) -> float | None:
    """Krippendorff's α for names (nominal data): 1 is agreement, 0 is what chance gives, below 0 is worse.

    A unit is the judgements of one item, by any raters; those with fewer than two say nothing. With o_ck the
    pairs of values in units, each unit's weighted by 1 / (its judgements - 1), and n_c their sums,
    α = 1 - (n - 1) Σ_{c≠k} o_ck / Σ_{c≠k} n_c n_k (Krippendorff 2011, "Computing Krippendorff's
    Alpha-Reliability", section C). None where there is nothing to agree on: no pair, or one value alone.
    """
    counts = [Counter(unit) for unit in units if len(unit) > 1]
    totals = sum(counts, Counter())
    n = totals.total()
    expected = n * n - sum(count * count for count in totals.values())
    if expected == 0:
        return None
    apart = sum(
        count * (unit.total() - count) / (unit.total() - 1) for unit in counts for count in unit.values()
    )
    return 1 - (n - 1) * apart / expected

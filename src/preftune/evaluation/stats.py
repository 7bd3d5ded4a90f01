"""Statistics of the comparison: intervals, paired tests, calibration, diversity. numpy and scipy, no torch.

Rows are prompts: average several samples of a prompt first, since they are not independent. Randomness comes
from the seed given, so that the same input gives the same numbers.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import stdtrit

from preftune.records.verdict import Z80, Z95

Floats = NDArray[np.float64]
Groups = NDArray[np.intp]  # (n,): the number of the group that a row is of, from 0
_TAILS = ((1 - 0.95) / 2, (1 + 0.95) / 2)  # shares of a distribution below the two ends of an interval
_FEW_GROUPS = 10  # do not show how much their rows are alike


class Interval(NamedTuple):
    """A confidence interval, both ends included."""

    low: float
    high: float


class PairedResult(NamedTuple):
    """Mean of a - b over pairs, its bootstrap interval and the p-value of "no difference"."""

    mean: float
    interval: Interval
    p_value: float


def wilson(wins: float, n: float, z: float = Z95) -> Interval:
    """Wilson's score interval of a proportion; ties may count as half a win. n = 0 says nothing: (0, 1).

    Wilson 1927, "Probable inference". ValueError: wins outside 0..n, a negative z.
    """
    if not 0 <= wins <= n:
        raise ValueError(f"{wins} wins out of {n}")
    if not z >= 0:
        raise ValueError(f"z is {z}; it must not be negative")
    if n == 0:
        return Interval(0.0, 1.0)
    p, shrink = wins / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z / shrink * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return Interval(max(min(centre - half, p), 0.0), min(max(centre + half, p), 1.0))  # rounding at 0 and 1


def share(wins: float, n: int) -> dict[str, Any]:
    """A record of `wins` out of `n` with Wilson's interval. ValueError as `wilson`."""
    return {"value": wins / n if n else None, "interval": list(wilson(wins, n)), "n": n}


def share_by_group(credits: ArrayLike, groups: Groups) -> dict[str, Any]:
    """`share` of credits (0, ½ or 1) that are not independent within a group: Wilson's interval of n / deff
    rows (`design_effect`). What `share` gives where no group has two rows.
    """
    x = _floats(credits)
    record, deff = share(float(x.sum()), len(x)), design_effect(x, groups)
    rows = len(x) / deff
    return record if deff == 1 else {**record, "interval": list(wilson(record["value"] * rows, rows))}


def design_effect(credits: ArrayLike, groups: Groups) -> float:
    """The variance of a share over groups by that over independent rows (Kish 1965), at least 1. Of rows that
    are all alike, and of few groups, which do not show it, a group is one row.
    """
    x = _floats(credits)
    n, count = len(x), len(np.unique(groups))
    if count == n:
        return 1.0
    p = float(x.mean())
    if count < _FEW_GROUPS or not 0 < p < 1:
        return n / count
    return max(by_group(x - p, groups).var(ddof=1) / count / (p * (1 - p) / n), 1.0)


def by_group(x: ArrayLike, groups: Groups) -> Floats:
    """Σ x · G / n over the rows of each group: one value for each of G, whose mean is that of x. Groups are
    independent where rows are not. x itself where no group has two rows.
    """
    x, (names, index) = _floats(x), np.unique(groups, return_inverse=True)
    return x if len(names) == len(x) else np.bincount(index, weights=x) * len(names) / len(x)


def spread_by_group(x: ArrayLike, groups: Groups) -> Floats:
    """As `by_group`, for an interval of the mean: how many rows the groups have is no part of the spread."""
    x = _floats(x)
    values = by_group(x - x.mean(), groups)
    return x if len(values) == len(x) else x.mean() + values


def mean(values: ArrayLike, resamples: int, seed: int, groups: Groups | None = None) -> dict[str, Any]:
    """A record of a mean with its bootstrap interval, over groups if given. ValueError: no values."""
    x = _floats(values)
    spread = x if groups is None else spread_by_group(x, groups)
    return {"mean": float(x.mean()), "interval": list(bootstrap_mean(spread, resamples, seed)), "n": len(x)}


def beats(a: ArrayLike, b: ArrayLike) -> dict[str, Any]:
    """A record of `win_rate`; NaN, of which nothing is known, lies anywhere. ValueError as `win_rate`."""
    rate, n = win_rate(a, b), np.size(a)
    return {"value": rate, "interval": [0.0, 1.0], "n": n} if math.isnan(rate) else share(rate * n, n)


def win_rate(a: ArrayLike, b: ArrayLike) -> float:
    """P(a > b) + P(a = b) / 2 over pairs; NaN if any value is. ValueError: no pairs, or different lengths."""
    return float(np.mean(wins(*_pairs(a, b))))


def wins(a: ArrayLike, b: ArrayLike) -> Floats:
    """1 where a > b, a half where they are equal, NaN where one is not known; elementwise."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    return np.where(np.isnan(a) | np.isnan(b), np.nan, (a > b) + 0.5 * (a == b))


def number_needed(differences: ArrayLike, least: int = 0) -> int | None:
    """How many differences (of prompts, of seeds) would show their mean with 80 % power at two-sided 5 %:
    ((1.96 + 0.84) sd / mean)². None for fewer than two, a mean of 0, or what is not finite. A rough number:
    sd itself comes from those that there are.
    """
    x = _floats(differences)
    if len(x) < 2 or x.mean() == 0 or not np.isfinite(x).all():
        return None
    return int(min(max(np.ceil(((Z95 + Z80) * x.std(ddof=1) / x.mean()) ** 2), least), 10**9))


def paired_difference(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """Mean of a - b and its standard error sd / √n (ddof 1; NaN for one pair). ValueError as `win_rate`."""
    a, b = _pairs(a, b)
    difference = a - b
    se = difference.std(ddof=1) / np.sqrt(len(difference)) if len(difference) > 1 else np.nan
    return float(difference.mean()), float(se)


def brier(p: ArrayLike, label: ArrayLike) -> float:
    """Mean of (p - label)²: 0 is perfect, always saying one half gives 0.25.

    ValueError as `win_rate`, and outside [0, 1].
    """
    p, label = _probabilities(p, label)
    return float(np.mean((p - label) ** 2))


def ece(p: ArrayLike, label: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: Σ_bins share · |accuracy - mean confidence|.

    Confidence is max(p, 1 - p), cut into `bins` equal parts of [0.5, 1], each with its lower edge; the
    prediction is 1 iff p > 0.5. Unlike the error of p itself this does not depend on how pairs are oriented,
    but for ties (p = 0.5).
    Guo et al. 2017 (arXiv:1706.04599), eq. 3. ValueError as `brier`, and for less than one bin.
    """
    if bins < 1:
        raise ValueError(f"{bins} bins; at least one is needed")
    p, label = _probabilities(p, label)
    confidence, correct, index = by_confidence(p, label, bins)
    gaps = np.bincount(index, weights=correct - confidence, minlength=bins)  # count · (accuracy - confidence)
    return float(np.abs(gaps).sum() / len(p))


def by_confidence(p: Floats, label: Floats, bins: int) -> tuple[Floats, NDArray[np.bool_], NDArray[np.intp]]:
    """Confidence, whether the prediction is right, and the bin, as `ece` has them: (n,) each."""
    confidence = np.maximum(p, 1 - p)
    edges = np.linspace(0.5, 1, bins + 1)
    return confidence, (p > 0.5) == (label > 0.5), np.digitize(confidence, edges[1:-1])


def distinct_n(tokens: ArrayLike, n: int) -> float:
    """Distinct n-grams / all n-grams of one token list; 0 where there are none.

    It falls with length, so compare equal token counts. Li et al. 2016 (arXiv:1510.03055).
    """
    grams = ngrams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition_n(tokens: ArrayLike, n: int) -> float:
    """1 - distinct n-grams / all n-grams: the share that is a repetition; 0 where there are no n-grams."""
    grams = ngrams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def bootstrap_mean(x: ArrayLike, resamples: int = 2000, seed: int = 0) -> Interval:
    """Bootstrap 95 % interval of the mean of x; see `bootstrap_columns`. ValueError: no values."""
    return bootstrap_columns(_floats(x)[:, None], resamples, seed)[0]


def bootstrap_columns(x: ArrayLike, resamples: int = 2000, seed: int = 0) -> list[Interval]:
    """95 % intervals of the means of the columns of x (n, columns), the same rows redrawn for all of them.

    The wider, at each end, of two: bootstrap-t, (mean - q se) with q a quantile of the resamples' own t
    (Efron & Tibshirani 1993, 12.5), which follows skew; and percentiles moved out by t_{n-1} / z ·
    √(n / (n - 1)) (Hesterberg 2015, arXiv:1411.5279), since plain ones hold the mean in 84 % of samples of 5
    and in 90 % of 10. One value, zeros only, or values that are not finite say nothing of their spread:
    (-inf, inf), which the report writes as unknown. Of equal values c, a share of up to 1 - 0.025^(1/n) may
    still differ (Clopper & Pearson 1934); it is taken to have the other sign: c ± 2 |c| share.
    ValueError: no rows.
    """
    x = np.asarray(x, dtype=np.float64)
    if len(x) == 0:
        raise ValueError("no values to take the mean of")
    varies = np.isfinite(x).all(0) & ~equal_values(x)
    intervals = [_of_equal_values(float(column[0]), column) for column in x.T]
    if not varies.any():
        return intervals
    rng = np.random.default_rng(seed)
    means, errors = _resampled(x[:, varies], resamples, rng)
    ends = _bootstrap_ends(x[:, varies], means, errors)
    for column, low, high in zip(np.flatnonzero(varies), *ends, strict=True):
        intervals[column] = Interval(float(low), float(high))
    return intervals


def equal_values(x: Floats) -> np.ndarray:
    """Whether the values of each column of x (n, columns) are the same but for rounding: bool (columns,)."""
    with np.errstate(invalid="ignore"):  # infinities: no
        return np.ptp(x, axis=0) <= 1e-9 * np.abs(x).max(0)


def _of_equal_values(value: float, column: Floats) -> Interval:
    if len(column) == 1 or not np.isfinite(column).all() or not column.any():
        return Interval(-math.inf, math.inf)
    half = 2 * abs(value) * (1 - _TAILS[0] ** (1 / len(column)))
    return Interval(value - half, value + half)


def _resampled(x: Floats, resamples: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Mean and its standard error in each resample: (resamples, columns) each."""
    means, errors = [], []
    for rows in _blocks(resamples, x.size):
        drawn = x[rng.integers(len(x), size=(rows, len(x)))]
        means.append(drawn.mean(1))
        errors.append(drawn.std(1, ddof=1) / math.sqrt(len(x)))
    return np.concatenate(means), np.concatenate(errors)


def _bootstrap_ends(x: Floats, means: Floats, errors: Floats) -> tuple[Floats, Floats]:
    n, centre = len(x), x.mean(0)
    wider = float(stdtrit(n - 1, _TAILS[1])) / NormalDist().inv_cdf(_TAILS[1]) * math.sqrt(n / (n - 1))
    low, high = centre + wider * (np.quantile(means, _TAILS, axis=0) - centre)
    usable = errors > 1e-9 * np.abs(x).max(0)  # a resample of one value alone has no t
    t = np.where(usable, (means - centre) / np.where(usable, errors, 1.0), np.nan)
    enough = usable.any(0)
    first, last = np.nanquantile(np.where(enough, t, 0.0), _TAILS, axis=0)
    se = x.std(0, ddof=1) / math.sqrt(n)
    low, high = np.minimum(low, centre - last * se), np.maximum(high, centre - first * se)
    return np.minimum(low, centre), np.maximum(high, centre)


def bootstrap_statistic(
    statistic: Callable[[Groups], float], n: int, resamples: int, seed: int, groups: Groups | None = None
) -> Interval:
    """Percentile bootstrap 95 % interval of any statistic of `n` rows, which is given the row numbers drawn:
    rows of one of `groups` (n,) together (Davison & Hinkley 1997, "Bootstrap Methods", 3.8).

    Draws on which it is not finite (a correlation of constants, a share of nothing) are left out. Where all
    others are equal, as of two points that always lie on one line, they say nothing of the spread: (-inf,
    inf), as where there are none. ValueError: n < 1.
    """
    if n < 1:
        raise ValueError("no values to take a statistic of")
    rng, redrawn = np.random.default_rng(seed), _redrawn(n, groups)
    values = np.array([statistic(redrawn(rng)) for _ in range(resamples)])
    values = values[np.isfinite(values)]
    if len(values) == 0 or np.ptp(values) <= 1e-12 * np.abs(values).max():
        return Interval(float("-inf"), float("inf"))
    return Interval(*np.quantile(values, [0.025, 0.975]).tolist())


def _redrawn(n: int, groups: Groups | None) -> Callable[[np.random.Generator], Groups]:
    """What draws the rows of a resample: n of n, or all rows of as many groups as there are."""
    groups = np.arange(n) if groups is None else groups
    sizes = np.unique(groups, return_counts=True)[1]
    if len(sizes) == n:
        return lambda rng: rng.integers(n, size=n)
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    return lambda rng: np.concatenate([members[i] for i in rng.integers(len(sizes), size=len(sizes))])


def sign_flip_test(difference: ArrayLike, resamples: int = 2000, seed: int = 0) -> float:
    """Two-sided p-value of "the mean of the paired differences is 0", by flipping their signs at random; 1
    where a difference is not finite.

    (1 + flips at least as extreme) / (1 + flips): never 0, and valid at any n
    (Phipson & Smyth 2010, arXiv:1603.05766).
    """
    difference = _floats(difference)
    if not np.isfinite(difference).all():
        return 1.0
    rng = np.random.default_rng(seed)
    n = len(difference)
    flipped = np.concatenate(
        [abs(rng.choice((-1.0, 1.0), size=(rows, n)) @ difference) for rows in _blocks(resamples, n)]
    )
    observed = abs(difference.sum())
    slack = 1e-12 * np.abs(difference).sum()  # the same set of signs may sum in another order
    return float((1 + np.sum(flipped >= observed - slack)) / (1 + resamples))


def paired_bootstrap(a: ArrayLike, b: ArrayLike, resamples: int = 2000, seed: int = 0) -> PairedResult:
    """Mean of a - b over pairs, its bootstrap 95 % interval and its sign-flip p-value.

    ValueError as `win_rate`.
    """
    a, b = _pairs(a, b)
    with np.errstate(invalid="ignore"):  # inf - inf: the mean is NaN, and says nothing
        difference = a - b
    interval = bootstrap_mean(difference, resamples, seed)
    return PairedResult(float(difference.mean()), interval, sign_flip_test(difference, resamples, seed))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: below α they hold with family-wise error α.

    adjusted_(i) = max_{j <= i} min(1, (m - j + 1) p_(j)) over the sorted p. Holm 1979.
    ValueError: p outside [0, 1].
    """
    p = _floats(p_values)
    if not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"p-values must lie in [0, 1], not {list(p_values)}")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(np.minimum(p[order] * np.arange(len(p), 0, -1), 1.0))
    return adjusted.tolist()


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Two-sided exact p-value of "both are right equally often" from the pairs on which one alone is right.

    The binomial test of `only_a` out of `only_a + only_b` at one half; 1 where the two never differ.
    McNemar 1947; exact form: Agresti, "Categorical Data Analysis", 10.1. ValueError: a negative count.
    """
    if min(only_a, only_b) < 0:
        raise ValueError(f"counts must not be negative, not {only_a} and {only_b}")
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1))
    return float(min(Fraction(2 * tail, 2**n), Fraction(1)))


def best_of_weights(n: int, pool: int) -> Floats:
    """Weight of the i-th smallest of `pool` scores in the mean best score over all subsets of `n`: (pool,).

    C(i - 1, n - 1) / C(pool, n), the share of subsets whose largest is the i-th: summed with any value of
    those rows it estimates that value of best-of-n without bias (as pass@k in Chen et al. 2021,
    arXiv:2107.03374, eq. 1). ValueError: n outside 1..pool.
    """
    if not 1 <= n <= pool:
        raise ValueError(f"best of {n} from {pool} responses")
    total = math.comb(pool, n)
    return np.array([math.comb(i, n - 1) / total for i in range(pool)])


def pairs_needed(p: float, null: float = 0.5) -> int | None:
    """Pairs needed to show an accuracy `p` above `null`: two-sided 5 %, 80 % power; None at or below it.

    n = ((1.96 √(q (1 - q)) + 0.84 √(p (1 - p))) / (p - q))², q = null: the normal approximation of the test
    of one proportion (Fleiss, Levin & Paik 2003, "Statistical Methods for Rates and Proportions", 2.5).
    """
    if p <= null:
        return None
    root = Z95 * math.sqrt(null * (1 - null)) + Z80 * math.sqrt(max(p * (1 - p), 0.0))
    return math.ceil((root / (p - null)) ** 2)


def paired_pairs_needed(only_a: float, only_b: float, n: int) -> int | None:
    """Pairs needed to show that a beats b, each alone right so often on `n` pairs; None unless a is ahead.

    With d and g the shares of discordant pairs and of their difference,
    (1.96 √d + 0.84 √(d - g²))² / g² (Connor 1987, Biometrics 43, 207-211).
    """
    d, g = (only_a + only_b) / n, (only_a - only_b) / n
    if g <= 0:
        return None
    return math.ceil(((Z95 * math.sqrt(d) + Z80 * math.sqrt(max(d - g * g, 0.0))) / g) ** 2)


def _blocks(resamples: int, size: int) -> list[int]:
    """Numbers of resamples to draw at a time, so that about a million values are in memory."""
    most = max(2**20 // max(size, 1), 1)
    return [min(most, resamples - start) for start in range(0, resamples, most)]


def _floats(x: ArrayLike) -> Floats:
    return np.asarray(x, dtype=np.float64).reshape(-1)


def _pairs(a: ArrayLike, b: ArrayLike) -> tuple[Floats, Floats]:
    a, b = _floats(a), _floats(b)
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"pairs needed, but there are {len(a)} and {len(b)} values")
    return a, b


def _probabilities(p: ArrayLike, label: ArrayLike) -> tuple[Floats, Floats]:
    p, label = _pairs(p, label)
    for name, x in (("p", p), ("label", label)):
        if ((x < 0) | (x > 1)).any():
            raise ValueError(f"{name} goes from {x.min():g} to {x.max():g}; it must lie in [0, 1]")
    return p, label


def ngrams(tokens: ArrayLike, n: int) -> list[tuple]:
    """All n-grams of a list or array of ids or words. ValueError: n < 1."""
    if n < 1:
        raise ValueError(f"n is {n}; an n-gram has at least one token")
    row = np.asarray(tokens).tolist()
    return list(zip(*(row[i:] for i in range(n)), strict=False))

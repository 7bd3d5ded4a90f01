"""Intervals over seeds and prompts. Seeds are the unit that a claim about an algorithm rests on.

Hierarchical bootstrap: draw seeds with replacement, then prompts of each drawn seed. With few seeds a plain
percentile interval is too narrow, by √((S - 1)/S) and by the normal quantile in place of Student's
(Hesterberg 2015, arXiv:1411.5279, section 3.1); the deviations between seeds are widened by just that factor,
so that three seeds or more without prompt noise give Student's t interval of their means or nearly so. Two
give a narrower one, which covers in 93 % of cases: a redraw has three values only. The prompts are drawn on
top, each seed's anew: a seed shuffles the test rows by itself, so that its prompts are its own draw. That
makes intervals a little too wide; where a test set is so small that all seeds ask nearly the same prompts,
what these share is averaged over seeds, which makes them too narrow (prompts alone: by up to √S). One seed:
over prompts only, which says nothing about other seeds.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from preftune.evaluation import stats
from preftune.evaluation.stats import Floats
from preftune.records.verdict import Z95, outcome


class Pooled(NamedTuple):
    """Means over seeds of means over prompts, each (columns,), with the ends of their 95 % intervals."""

    mean: Floats
    low: Floats
    high: Floats


def seed_widening(seeds: int) -> float:
    """How far deviations between so few seeds are stretched: t_{S-1} / z · √(S / (S - 1)); 1 for one."""
    if seeds < 2:
        return 1.0
    return float(stdtrit(seeds - 1, 0.975)) / Z95 * math.sqrt(seeds / (seeds - 1))


def pooled_means(seeds: Sequence[Floats], resamples: int = 2000, seed: int = 0) -> Pooled:
    """The mean over seeds of each seed's mean over prompts, with a hierarchical bootstrap interval.

    `seeds`: one array (prompts, columns) a seed; columns must agree, prompts need not. All columns of a seed
    are redrawn together, so that differences between columns stay paired. ValueError: no seed, or one
    without prompts.
    """
    if not seeds or any(len(table) == 0 for table in seeds):
        raise ValueError("a pooled mean needs at least one seed, and a prompt in each")
    rng = np.random.default_rng(seed)
    count = len(seeds)
    means = np.stack([table.mean(0) for table in seeds])  # (S, C)
    centre = means.mean(0)
    # Resample r takes `count` seeds; `within[s][r, k]` is a bootstrap mean over prompts of seed s for slot k.
    drawn = rng.integers(count, size=(resamples, count))
    total = np.zeros((resamples, means.shape[1]))
    for s, values in enumerate(seeds):
        slots = (drawn == s).sum(1)  # how often each resample took this seed
        noise = _prompt_noise(values, int(slots.sum()), rng)
        owner = np.repeat(np.arange(resamples), slots)
        np.add.at(total, owner, noise)
        total += slots[:, None] * seed_widening(count) * (means[s] - centre)
    replicates = centre + total / count
    low, high = np.quantile(replicates, [0.025, 0.975], axis=0)
    return Pooled(centre, np.minimum(low, centre), np.maximum(high, centre))


def pooled_gain(seeds: Sequence[Floats], resamples: int = 2000) -> dict[str, Any]:
    """A record of a difference, (prompts,) a seed: its mean, the ends of its interval and the verdict."""
    (value,), (low,), (high,) = pooled_means([values[:, None] for values in seeds], resamples)
    low, high = gain_ends(float(low), float(high), seeds)
    return {"value": float(value), "low": low, "high": high, "verdict": pooled_verdict(low, high, seeds)}


def gain_ends(low: float, high: float, seeds: Sequence[Floats]) -> tuple[float | None, float | None]:
    """The ends of the interval of a difference, (prompts,) a seed. Where all values are the same there would
    be no width: then what so many equal values of one run say (`stats.bootstrap_columns`), seeds for several
    seeds, prompts for one; None of a single value. Zeros, as of the reference against itself, stay.
    """
    values = np.concatenate(seeds)
    if values[0] == 0 or not stats.equal_values(values[:, None]).all():
        return low, high
    n = len(seeds) if len(seeds) > 1 else len(values)
    if n == 1:
        return None, None
    interval = stats.bootstrap_mean(np.full(n, values[0]))
    return interval.low, interval.high


def _prompt_noise(values: Floats, draws: int, rng: np.random.Generator) -> Floats:
    """Bootstrap means over prompts minus the mean itself: (draws, columns)."""
    n = len(values)
    noise = np.empty((draws, values.shape[1]))
    for start in range(0, draws, 1000):  # counts of 1,000 redraws at a time
        size = min(1000, draws - start)
        rows = rng.integers(n, size=(size, n)) + np.arange(size)[:, None] * n
        counts = np.bincount(rows.ravel(), minlength=size * n).reshape(size, n)
        noise[start : start + size] = counts @ values / n
    return noise - values.mean(0)


def pooled_verdict(low: float | None, high: float | None, seeds: Sequence[Floats] = ()) -> str:
    """The verdict that a difference's interval over `seeds` allows. From a few prompts of one seed, as within
    a run, it allows none: over 5 prompts it would be wrong in 16 % of cases.
    """
    return outcome(low, high, len(seeds[0]) if len(seeds) == 1 else None)
